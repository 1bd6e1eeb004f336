"""Products timed on this machine: engines beside bfloat16, and the plans of the Triton engine for its table."""

from .engines import SHAPES, Comparison, Timing, bench
from .place import Setting
from .plans import TunedProduct, Tuning, tune

__all__ = ["SHAPES", "Comparison", "Setting", "Timing", "TunedProduct", "Tuning", "bench", "tune"]
