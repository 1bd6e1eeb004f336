"""Dense values of a view of a weight, dequantized from as few bytes as possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..scaled import ScaledTensor
from .geometry import Part, part_of
from .home import Home
from .lookup import dequantized
from .precision import original_values
from .stored import lock


def kept(home: Home) -> bool:
    """Whether the original is kept, so that writes, and reads of ``data``, are exact, though products are not."""
    return home.original is not None and not home.follows and home.stored is not None


def taken_by_value(weight: Any) -> bool:
    """Whether reads and products take the original: the weight's precision is that, or it is ``data``, by which
    adapters merge, or a view."""
    if weight._home.precision == "original":
        return True
    return "_by_value" in weight.__dict__ and not getattr(weight, "_is_param", False) and kept(weight._home)


def read_of(weight: Any) -> torch.Tensor:
    """``read`` of a weight's values; of ``data`` the original where that is kept, so that what is computed from it and
    written back stays exact."""
    home, view = weight._home, (weight.size(), weight.stride(), weight.offset)
    if home.precision == "original":
        return window(original_values(home, weight.dtype), *view)
    if not taken_by_value(weight) or home.dense is not None:
        return read(home, *view, weight.dtype)
    home.activity.dequantized()
    with lock():
        return window(home.values(weight.dtype), *view).clone()


def read(home: Home, size: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype) -> torch.Tensor:
    """The dense values of a view in new memory; counted as a dequantization."""
    home.activity.dequantized()
    size, stride = tuple(size), tuple(stride)
    if home.dense is not None:  # pending or never quantized: the exact values, before rounding
        with lock():  # not during a write
            if (dense := home.dense) is not None:
                return window(dense, size, stride, offset).to(dtype, copy=True)
    stored = home.settle()
    assert stored is not None
    weight = stored.scaled()
    layout = home.layout
    part = part_of(layout, size, stride, offset)
    if part is not None and (taken := part.take(weight)) is not None:
        w = dequantized(taken, dtype)
        if part.flipped:
            w = w.transpose(-1, -2)
        if size == layout.folded:
            return w.reshape(size)
        return w.contiguous() if part.flipped == layout.turned else w
    experts, matrix = _experts(home, size, stride, offset)
    if experts is not None:  # some experts of a stack
        first, count = experts
        weight = ScaledTensor(
            weight.data[first : first + count], weight.scale[first : first + count], weight.granularity
        )
        offset -= first * matrix
    elif (band := _rows(home, size, stride, offset)) is not None:
        first, count = band
        taken = Part((first, count), (0, layout.shape[-1])).take(weight)
        assert taken is not None
        weight = taken
        offset -= first * layout.shape[-1]
    w = dequantized(weight, dtype)
    w = w.transpose(-1, -2).contiguous() if layout.turned else w
    return w.as_strided(size, stride, offset).clone()


def window(dense: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> torch.Tensor:
    """A view of a weight's dense values, which may start anywhere in memory, for example inside a flat tensor."""
    return dense.as_strided(size, stride, int(dense.storage_offset()) + offset)


def _last(size: Sequence[int], stride: Sequence[int], offset: int) -> int:
    """The offset of the last element of a view."""
    return offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def _experts(home: Home, size: Sequence[int], stride: Sequence[int], offset: int) -> tuple[tuple[int, int] | None, int]:
    """The experts of a stack that a view touches, as (first, count); None for a matrix or an empty view."""
    *stack, n, k = home.layout.shape
    if not stack or 0 in size or n * k == 0:
        return None, 0
    first, last = offset // (n * k), _last(size, stride, offset) // (n * k)
    return (first, last - first + 1), n * k


def _rows(home: Home, size: Sequence[int], stride: Sequence[int], offset: int) -> tuple[int, int] | None:
    """The rows of a matrix that a view touches, as (first, count); ``first`` is rounded down to a block boundary."""
    layout = home.layout
    n, k = layout.matrix
    if layout.turned or 0 in size or k == 0:
        return None
    block = home.scheme.weight.rows or n
    first = offset // k // block * block
    return first, _last(size, stride, offset) // k + 1 - first
