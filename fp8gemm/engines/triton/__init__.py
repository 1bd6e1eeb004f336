"""fp8gemm's Triton engine: the engine, the plans and tables from which it chooses tiles, and the kernels."""

from .engine import Triton, TritonEngine

__all__ = ["Triton", "TritonEngine"]
