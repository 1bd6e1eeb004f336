"""Convolutions whose windows do not overlap, transposed convolutions and nn.Bilinear, computed as matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .dispatch import OPERATIONS, implements
from .products import linear, matrix
from .weight import FP8Weight

aten = torch.ops.aten


@implements(OPERATIONS, aten.convolution.default)
def _convolution(
    x: Any,
    weight: Any,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """``x [B, C, *spatial]`` as patches, ``[B * patches, C * window]``, times ``[N, C * window].T``."""
    if not isinstance(weight, FP8Weight) or isinstance(x, FP8Weight) or weight.dim() < 3 or x.dim() != weight.dim():
        return NotImplemented
    window = tuple(weight.shape[2:])
    apart = window == _each(stride, len(window)) and (set(dilation) == {1} or set(window) == {1})
    if groups != 1 or any(padding) or any(output_padding) or not apart:
        return NotImplemented
    if transposed:
        return _spread(x, weight, bias, window)
    w = matrix(weight)
    if w is None or x.shape[1] != weight.shape[1]:
        return NotImplemented
    if any(size < extent for size, extent in zip(x.shape[2:], window, strict=True)):
        return NotImplemented  # torch raises its own error
    rows, places = patches(x, window)
    n = weight.shape[0]
    y = linear(rows, w, bias)
    if y is NotImplemented:
        return y
    y = y.view(x.shape[0], -1, n).transpose(1, 2)  # in three dimensions, which torch transposes fastest
    if x.is_contiguous():  # as in torch, a channels-last input gives a channels-last output
        y = y.contiguous()
    return y.unflatten(2, places)


def _spread(x: torch.Tensor, weight: FP8Weight, bias: torch.Tensor | None, window: tuple[int, ...]) -> Any:
    """Transposed: each position of ``x [B, K, *spatial]`` times ``[K, N * window]`` becomes one window."""
    w = matrix(weight)
    if w is None or x.shape[1] != weight.shape[0]:
        return NotImplemented
    y = linear(x.movedim(1, -1), w.turned_around())
    if y is NotImplemented:
        return y
    n, axes = weight.shape[1], len(window)
    y = y.unflatten(-1, (n, *window))  # [B, *spatial, N, *window]
    order = [axis for place in range(axes) for axis in (1 + place, 2 + axes + place)]
    y = y.permute(0, 1 + axes, *order)
    y = y.reshape(x.shape[0], n, *(size * extent for size, extent in zip(x.shape[2:], window, strict=True)))
    y = y.contiguous() if x.is_contiguous() else y
    return y if bias is None else y + bias.view(-1, *[1] * axes)


def patches(x: torch.Tensor, window: tuple[int, ...]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """``x [B, C, *spatial]`` as rows ``[B * patches, C * window]``, and the number of patches along each axis."""
    if set(window) == {1}:
        return x.flatten(2).transpose(1, 2).contiguous().view(-1, x.shape[1]), tuple(x.shape[2:])
    batch, channels = x.shape[:2]
    places = tuple(size // extent for size, extent in zip(x.shape[2:], window, strict=True))
    for axis, (place, extent) in enumerate(zip(places, window, strict=True), start=2):
        x = x.narrow(axis, 0, place * extent)
    split = [part for place, extent in zip(places, window, strict=True) for part in (place, extent)]
    axes = range(2, 2 + 2 * len(window))
    x = x.reshape(batch, channels, *split).permute(0, *axes[::2], 1, *axes[1::2])
    return x.reshape(batch * math.prod(places), channels * math.prod(window)), places


def _each(values: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(values) if len(values) == count else tuple(values) * count


@implements(OPERATIONS, aten._trilinear.default)
def _trilinear(
    a: Any,
    weight: Any,
    b: Any,
    expand_a: Sequence[int],
    expand_weight: Sequence[int],
    expand_b: Sequence[int],
    summed: Sequence[int],
    unrolled: int = 1,
) -> Any:
    """F.bilinear: ``y[m, o] = sum_ij a[m, i] * weight[o, i, j] * b[m, j]``, with ``weight`` as ``[o * i, j]``."""
    bilinear = (list(expand_a), list(expand_weight), list(expand_b), list(summed)) == ([1, 3], [0], [1, 2], [2, 3])
    if not bilinear or not isinstance(weight, FP8Weight) or weight.dim() != 3 or not weight.is_whole():
        return NotImplemented
    outputs, first, second = weight.shape
    y = linear(b, weight.like(((outputs * first, second), (second, 1), 0)))
    if y is NotImplemented:
        return NotImplemented
    return torch.einsum("moi,mi->mo", y.view(-1, outputs, first), a)
