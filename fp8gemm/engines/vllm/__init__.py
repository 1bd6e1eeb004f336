"""vLLM's kernels: the engine, and what it runs on a CPU and on CUDA."""

from .engine import Vllm, VllmEngine, find

__all__ = ["Vllm", "VllmEngine", "find"]
