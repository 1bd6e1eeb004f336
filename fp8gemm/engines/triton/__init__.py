"""Triton kernels of our own: the engine, the plans and tables that it chooses tiles from, and the kernels."""

from .engine import Triton, TritonEngine

__all__ = ["Triton", "TritonEngine"]
