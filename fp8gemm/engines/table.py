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

# Plain dicts: torch.compile gives up on a MappingProxyType where a forward changes any dict.
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
# What ``auto`` tries, in this order, by device; on a CPU with compiled kernels those come first. Triton comes before
# torch: its large products are torch's own behind one quantization launch, where torch takes a handful and so loses to
# bfloat16 in eager (published: 0.76x on Flux). It checks itself on a card before it is taken; it was not timed yet.
AUTO: dict[str, tuple[str, ...]] = {
    "native": ("cpu", "vllm"),
    "cpu": ("vllm", "cpu"),
    "cuda": ("vllm", "triton", "torch"),
    "rocm": ("torch",),
    "xpu": ("torch",),
    "mps": ("torch",),
}


def register_engine(engine: Engine, *, auto: Iterable[str] = ()) -> Engine:
    """Adds an engine of your own to the table; ``FP8GemmOptions(engine=engine.name)`` then runs it.

    The conformance suite of this project, ``tests/conformance.py``, says whether it is right.

    Args:
        auto: kinds of device (``"cpu"``, ``"cuda"``, ``"rocm"``, ``"xpu"``, ``"mps"``; ``"native"`` is a CPU with
            compiled kernels) on which ``auto`` tries it before all others.

    Returns:
        ``engine`` itself.

    Raises:
        ValueError: there is an engine of that name, or no device of that kind. ``examples/own_engine.py`` shows one.

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
        raise ValueError(f"an engine needs a name that is not taken: {taken} and auto are; found {engine.name!r}")
    if unknown := [kind for kind in kinds if kind not in AUTO]:
        raise ValueError(f"auto must name kinds of device among {', '.join(AUTO)}, found {', '.join(unknown)}")
    ENGINES[engine.name] = engine
    for kind in kinds:
        AUTO[kind] = (engine.name, *AUTO[kind])
    return engine
