"""The table of engines, and the order in which ``auto`` tries them."""

from __future__ import annotations

from collections.abc import Mapping

from .base import Engine
from .cpu import CpuEngine
from .deep_gemm import DeepGemmEngine
from .reference import ReferenceEngine
from .torch_mm import TorchEngine
from .triton import TritonEngine
from .vllm import VllmEngine

# Read-only by its type alone: torch.compile gives up on a MappingProxyType where a forward changes any dict.
ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        VllmEngine(),
        TorchEngine(),
        TritonEngine(),
        DeepGemmEngine(),
        CpuEngine(),
        ReferenceEngine(),
    )
}
# What ``auto`` tries, in this order, by device; on a CPU with compiled kernels those come first. Triton comes before
# torch: its large products are torch's own behind one quantization launch, where torch takes a handful and so loses to
# bfloat16 in eager (published: 0.76x on Flux). It checks itself on a card before it is taken; it was not timed yet.
AUTO: Mapping[str, tuple[str, ...]] = {
    "native": ("cpu", "vllm"),
    "cpu": ("vllm", "cpu"),
    "cuda": ("vllm", "triton", "torch"),
    "rocm": ("torch",),
    "xpu": ("torch",),
    "mps": ("torch",),
}
