"""Engines. Adding one: a file, or a folder of its own, and a row of the table."""

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
