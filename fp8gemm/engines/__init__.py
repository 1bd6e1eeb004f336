"""Engines: the implementations of FP8 matrix products. A new one needs a file or folder, and a row in the table."""

from .base import Choice, Engine, Machine, MatmulSpec, PackedWeight
from .choice import choose, order, prepare, probe, restore
from .table import AUTO, ENGINES, register_engine

__all__ = [
    "AUTO",
    "ENGINES",
    "Choice",
    "Engine",
    "Machine",
    "MatmulSpec",
    "PackedWeight",
    "choose",
    "order",
    "prepare",
    "probe",
    "register_engine",
    "restore",
]
