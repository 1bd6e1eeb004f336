"""Products timed on this machine: engines beside bfloat16, and the plans of the Triton engine for its table."""

from .engines import SHAPES, bench
from .plans import tune
from .text import failed, tell

__all__ = ["SHAPES", "bench", "failed", "tell", "tune"]
