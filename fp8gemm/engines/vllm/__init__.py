"""vLLM's kernels: the engine, and what it runs on a CPU and on CUDA."""

from .engine import VllmEngine, find

__all__ = ["VllmEngine", "find"]
