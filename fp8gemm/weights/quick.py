"""Calls like one that was seen before: everything is decided, and only what may have changed since is looked at.

A layer binds a call the second time it meets a shape. From then on such a call costs the checks of ``Bound.fits`` and
the engine's launch; whatever does not fit goes the long way, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ..engines import ENGINES, Prepared
from .original import Activity, Original
from .product import wants_derivative

Key = tuple[torch.Size, torch.dtype, torch.device]
SHAPES = 32  # that a layer keeps bound; one more and it starts again
KEPT_KERNEL = "kept 16-bit weight"  # in the report
ALIGNMENT = 16  # bytes, of inputs: what compiled kernels were specialized for


class Layer(Protocol):
    """What of an FP8Linear decides whether a call is like an earlier one."""

    compute_dtype: torch.dtype
    activity: Activity
    _original: Original
    _published: Prepared | None
    _bound: dict[Key, Bound | Unbound]
    _buffers: dict[str, torch.Tensor | None]
    _parameters: dict[str, nn.Parameter | None]

    def faster_kept(self, x: torch.Tensor, bias: torch.Tensor | None, prepared: Prepared) -> torch.Tensor | None:
        """A kept weight that is multiplied sooner."""


class Bound:
    """One layer's call for inputs of one shape, dtype and device."""

    __slots__ = ("address", "bias", "bias_address", "compute", "kernel", "kind", "prepared")

    def __init__(
        self,
        layer: Layer,
        prepared: Prepared,
        compute: Callable[[torch.Tensor], torch.Tensor],
        kernel: str,
    ) -> None:
        self.prepared, self.compute, self.kernel = prepared, compute, kernel
        self.kind = prepared.device.type
        self.address = prepared.data.data_ptr()
        self.bias = layer._parameters["bias"]
        self.bias_address = 0 if self.bias is None else self.bias.data_ptr()

    def fits(self, layer: Layer, x: torch.Tensor) -> bool:
        """Whether the layer and ``x`` are as they were, beyond the key; whether nobody wants gradients or a cast."""
        prepared, bias = self.prepared, self.bias
        return (
            layer._published is prepared
            and layer._buffers["fp8_weight"] is prepared.data
            and prepared.data.data_ptr() == self.address
            and layer._parameters.get("bias", layer) is bias
            and (bias is None or bias.data_ptr() == self.bias_address)
            and not layer._original.changed
            and _plain(x, bias, self.kind)
        )

    def __call__(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        layer.activity.count(self.kernel)
        return self.compute(x)


class Unbound:
    """A call that goes the long way."""


UNBOUND = Unbound()  # no engine makes it shorter
SEEN = Unbound()  # once


def notice(layer: Layer, key: Key, x: torch.Tensor) -> None:
    """Remembers that a plain input of this key came, and binds its call if it is the second."""
    seen = layer._bound.get(key)
    if seen is None:
        if len(layer._bound) >= SHAPES:
            layer._bound = {}
        layer._bound[key] = SEEN
    elif seen is SEEN:
        bound = _bind(layer, x)
        if bound is not None:
            layer._bound[key] = bound


def _bind(layer: Layer, x: torch.Tensor) -> Bound | Unbound | None:
    """The call for inputs like ``x``; None where this very one cannot tell."""
    prepared, bias = layer._published, layer._parameters.get("bias", x)
    if (
        prepared is None
        or prepared.data is not layer._buffers["fp8_weight"]
        or prepared.device != x.device
        or layer._original.changed
        or bias is x
        or (bias is not None and (bias.device != x.device or type(bias) is not torch.nn.Parameter))
        or x.dim() == 0
        or x.shape[-1] != prepared.k
        or x.numel() == 0
        or not _plain(x, bias, x.device.type)
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    if x.dtype != layer.compute_dtype or x.dtype not in prepared.dtypes:
        return UNBOUND
    kept = layer.faster_kept(x, bias, prepared)
    if kept is not None:
        return Bound(layer, prepared, lambda given: F.linear(given, kept, bias), KEPT_KERNEL)
    engine, m = ENGINES[prepared.engine], x.numel() // prepared.k
    with torch.no_grad():
        compute = engine.bind(x, prepared, bias, x.dtype)
    return UNBOUND if compute is None else Bound(layer, prepared, compute, engine.kernel(m, prepared, x.dtype))


def _plain(x: torch.Tensor, bias: torch.Tensor | None, kind: str) -> bool:
    """Whether ``x`` lies as kernels want it, and neither autograd nor autocast has anything to do with it."""
    return (
        x.is_contiguous()
        and x.data_ptr() % ALIGNMENT == 0
        and not wants_derivative(x, bias)
        and not torch.is_autocast_enabled(kind)
    )
