"""What an FP8 layer remembers: the layer it was, and what it has done since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..scaled import WeightStorage


@dataclass
class Original:
    """The layer as it was: its class, and its weight where that is kept."""

    kind: type[Any]
    nbytes: int
    requires_grad: bool
    weight: nn.Parameter | None = None
    version: int | None = None

    def hold(self, weight: nn.Parameter) -> None:
        self.weight, self.version = weight, tensor_version(weight)

    @property
    def changed(self) -> bool:
        """Whether the kept weight was written to since it was quantized."""
        return self.weight is not None and tensor_version(self.weight) != self.version

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, storage: WeightStorage) -> None:
        """Moves and casts the kept weight along (``cpu_offload``: only casts it), without counting as a change."""
        weight = self.weight
        assert weight is not None
        with torch.no_grad():
            weight.data = weight.data.to(dtype) if storage == "cpu_offload" else fn(weight.data)
        self.hold(weight)


@dataclass
class Activity:
    """What a layer did: calls, the kernels that ran, and how often its lazy weight was dequantized."""

    calls: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    latest: str = ""  # kernel
    dequantizations: int = 0

    def count(self, kernel: str) -> None:
        """One call, which ran ``kernel``."""
        self.calls += 1
        self.kernels[kernel] += 1
        self.latest = kernel


def renamed_subclass(base: Any, members: dict[str, Any], rebuild: Callable[..., Any], *key: Any) -> type[Any]:
    """A subclass of ``base`` under its name and from its module; pickle makes an instance by ``rebuild(*key)``."""

    def reduce(instance: Any, protocol: Any) -> Any:
        get_state = getattr(instance, "__getstate__", None)  # every object has it from Python 3.11 on
        return (rebuild, key, instance.__dict__ if get_state is None else get_state())

    own = {"__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**members, **own})


def tensor_version(weight: torch.Tensor) -> int | None:
    """How often a tensor was written to, as autograd counts; tensors made in inference mode are not counted."""
    return None if weight.is_inference() else weight._version
