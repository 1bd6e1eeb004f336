"""vLLM's kernels: the engine, and its implementations for CPU and CUDA."""

from .engine import Vllm, VllmEngine, find

__all__ = ["Vllm", "VllmEngine", "find"]
