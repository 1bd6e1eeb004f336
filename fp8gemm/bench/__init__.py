"""Benchmarks on this machine: engines compared with bfloat16, and tuning of the Triton engine's plans."""

from .engines import SHAPES, Comparison, Timing, bench
from .place import Setting
from .plans import TunedProduct, Tuning, tune

__all__ = ["SHAPES", "Comparison", "Setting", "Timing", "TunedProduct", "Tuning", "bench", "tune"]
