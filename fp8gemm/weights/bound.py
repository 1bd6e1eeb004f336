"""Bound calls: calls of a layer for which all decisions were made in advance, to reduce the overhead per call.

A layer binds a call when it sees an input shape for the second time. From then on, such a call costs the checks of
``Bound.fits`` and the engine's launch. All other calls take the general path of ``FP8Linear``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ..engines import ENGINES, PackedWeight
from .activity import KEPT_KERNEL
from .home import Home
from .product import in_forward_mode, wants_derivative
from .remembered import ALIGNMENT
from .weight import FP8Weight

Key = tuple[torch.Size, torch.dtype, torch.device]
SHAPES = 32  # the most shapes that a layer keeps bound; one more clears them


class Layer(Protocol):
    """The part of an FP8Linear that decides whether a bound call is still valid."""

    _parameters: dict[str, Any]


class Bound:
    """A layer's call for inputs of one shape, dtype and device, valid for one version of its weight."""

    __slots__ = ("bias", "bias_address", "compute", "held", "home", "kernel", "kind", "version")

    def __init__(
        self,
        home: Home,
        version: int,
        bias: nn.Parameter | None,
        held: tuple[PackedWeight, torch.Tensor | None],
        compute: Callable[[torch.Tensor], torch.Tensor],
        kernel: str,
        kind: str,
    ) -> None:
        self.home, self.version, self.compute, self.kernel, self.kind = home, version, compute, kernel, kind
        self.bias = bias
        # Keeps the memory of weight and bias alive: another thread may replace both while a kernel reads them.
        self.held = held
        self.bias_address = 0 if held[1] is None else held[1].data_ptr()

    def fits(self, layer: Layer, x: torch.Tensor) -> bool:
        """Whether weight, bias and ``x`` allow this call (beyond its key), and no gradient or autocast is required."""
        home, bias = self.home, self.bias
        parameters = layer._parameters
        weight = parameters.get("weight")
        return (
            type(weight) is FP8Weight
            and weight._home is home
            and home.version == self.version
            and (home.original is None or not home.changed)
            and parameters.get("bias", layer) is bias
            and (bias is None or bias.data_ptr() == self.bias_address)
            and _plain(x, bias, self.kind)
        )

    def is_stale(self, layer: Layer, weight: FP8Weight) -> bool:
        """Whether weight or bias have changed, so that this call is never valid again."""
        bias, home = self.bias, weight._home
        if self.home is not home or self.version != home.version or layer._parameters.get("bias", layer) is not bias:
            return True
        return bias is not None and bias.data_ptr() != self.bias_address

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.home.activity.count(self.kernel)
        return self.compute(x)


class Unbound:
    """A marker for calls that take the general path."""


UNBOUND = Unbound()  # the engine has nothing to bind
SEEN = Unbound()  # called once so far


def notice(layer: Layer, weight: FP8Weight, key: Key, x: torch.Tensor) -> None:
    """Notes an input with this key, and binds its call if it is the second."""
    calls = layer.__dict__.get("_bound")
    if calls is None:  # another thread is undoing the patch
        return
    seen = calls.get(key)
    if seen is None:
        if len(calls) >= SHAPES:
            calls.clear()
        calls[key] = SEEN
    elif seen is not UNBOUND:
        bound = _bind(layer, weight, x)
        if bound is not None:
            calls[key] = bound


def _bind(layer: Layer, weight: FP8Weight, x: torch.Tensor) -> Bound | Unbound | None:
    """The call for inputs like ``x``; None if this input does not allow a decision."""
    home, bias = weight._home, layer._parameters.get("bias", x)
    # in this order, so that what another thread publishes in between is detected
    version, stored = home.version, home.stored
    packed = None if stored is None else stored.packed
    if (
        home.pending
        or home.precision == "original"
        or type(home) is not Home  # FSDP2 frees its weight after the layer has run
        or stored is None
        or packed is None
        or stored.device != x.device
        or bias is x
        or (bias is not None and (bias.device != x.device or type(bias) is not nn.Parameter))
        or (bias is not None and bias.dtype not in (x.dtype, torch.float32))
        or not weight.is_whole()
        or x.dim() == 0
        or x.shape[-1] != home.layout.shape[-1]
        or x.numel() == 0
        or not _plain(x, bias, x.device.type)
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    if x.dtype != weight.dtype or x.dtype not in packed.dtypes:
        return UNBOUND
    kind = x.device.type
    held = None if bias is None else bias.detach()
    kept = faster_kept(home, x, held, packed)
    if kept is not None:
        return Bound(home, version, bias, (packed, held), lambda given: F.linear(given, kept, held), KEPT_KERNEL, kind)
    engine, m = ENGINES[packed.engine], x.numel() // packed.k
    with torch.no_grad():
        compute = engine.bind(x, packed, held, x.dtype)
    if compute is None:
        return UNBOUND
    return Bound(home, version, bias, (packed, held), compute, engine.kernel(m, packed, x.dtype), kind)


def faster_kept(home: Home, x: torch.Tensor, bias: torch.Tensor | None, packed: PackedWeight) -> torch.Tensor | None:
    """The kept original, if it is on the device of ``x`` and the engine expects it to be faster than FP8."""
    original = home.original
    if original is None or x.numel() == 0:
        return None
    kept = original.detach()
    alike = kept.device == x.device and kept.dtype == x.dtype and (bias is None or bias.dtype == kept.dtype)
    loses = alike and ENGINES[packed.engine].loses(x.numel() // packed.k, packed, x.dtype)
    return kept if loses else None


def _plain(x: torch.Tensor, bias: torch.Tensor | None, kind: str) -> bool:
    """Whether ``x`` is laid out as kernels need it, and neither autograd nor autocast is involved."""
    return (
        x.is_contiguous()
        and x.data_ptr() % ALIGNMENT == 0
        and not wants_derivative(x, bias)
        and not in_forward_mode()
        and not torch.is_autocast_enabled(kind)
    )
