"""Examining this machine: versions, devices, which engine runs which scheme and whether it is right, known problems."""

from .examination import Examination, ExaminedDevice, devices, examine
from .known import KNOWN, KnownProblem
from .probing import PROBES, ProbedProduct, ProbeName, probe_engines

__all__ = [
    "KNOWN",
    "PROBES",
    "Examination",
    "ExaminedDevice",
    "KnownProblem",
    "ProbeName",
    "ProbedProduct",
    "devices",
    "examine",
    "probe_engines",
]
