"""Empty and padded weights: for ``to_empty``, FSDP2 and DTensor."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..scaled import ScaledTensor, Scheme
from .copies import COPIES_ARE_DENSE, is_8_bits, own, part_taken, with_smaller_blocks
from .dispatch import OPERATIONS, implements
from .geometry import Layout, swapped
from .home import Home
from .precision import refuse_original
from .sharding import shard_scheme
from .stored import Stored
from .weight import FP8Weight

aten = torch.ops.aten


@implements(OPERATIONS, aten.empty_like.default)
def _empty_like(
    weight: FP8Weight, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **others: Any
) -> Any:
    """An empty FP8 weight of the same shape, for ``to_empty``. Pending writes stay pending."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        refuse_original(weight._home)  # DTensor is about to send a part to it
    weight = with_smaller_blocks(weight)
    part = weight.part()
    if part is None or (dtype is not None and (not dtype.is_floating_point or is_8_bits(dtype))):
        return NotImplemented
    if COPIES_ARE_DENSE in weight.__dict__:
        return NotImplemented
    folded = tuple(weight.shape) == weight._home.layout.folded
    shape = weight._home.layout.shape if folded else swapped(weight.shape, part.flipped)
    if part.take(_blank(weight._home, weight._home.layout.shape, torch.device("meta"))) is None:
        return NotImplemented
    where = weight.device if device is None else torch.device(device)
    empty = own(weight, _blank(weight._home, shape, where), part, dtype or weight.dtype).fresh()
    empty._home.precision = "fp8" if empty._home.precision == "original" else empty._home.precision
    return empty


def _blank(home: Home, shape: tuple[int, ...], device: torch.device, scheme: Scheme | None = None) -> ScaledTensor:
    grid = (scheme or home.scheme).weight
    data = torch.zeros(shape, dtype=torch.uint8, device=device).view(home.options.weight_dtype)
    return ScaledTensor(data, torch.ones(grid.scale_shape(shape), dtype=torch.float32, device=device), grid)


@implements(OPERATIONS, aten.new_zeros.default)
def _new_zeros(weight: FP8Weight, size: Any, *, dtype: Any = None, device: Any = None, **others: Any) -> Any:
    """An empty weight for FSDP2: some rows of a matrix, or some experts of a stack."""
    home, part, size = weight._home, weight.part(), tuple(size)
    refuse_original(home)
    flipped = len(size) == 3 and home.layout.turned
    if len(size) != weight.dim() or dtype not in (None, weight.dtype) or home.layout.folded is not None:
        return NotImplemented
    if (part is None and weight.numel()) or (part is not None and part.flipped != flipped):
        return NotImplemented
    scheme = home.scheme
    if 0 in size:  # DTensor's shard on a rank that holds nothing
        if COPIES_ARE_DENSE in weight.__dict__ or sum(a != b for a, b in zip(size, weight.shape, strict=True)) > 1:
            return NotImplemented
    elif size[1:] != tuple(weight.shape)[1:] or (len(size) == 2 and home.layout.turned):
        return NotImplemented
    elif len(size) == 2 and size != home.layout.size:
        scheme = shard_scheme(scheme, weight.shape[0], size[0])
    *experts, a, b = size
    layout = Layout((*experts, b, a) if flipped else size, flipped)
    blank = _blank(home, layout.shape, weight.device if device is None else torch.device(device), scheme)
    if 0 not in size and 4 * math.prod(blank.scale.shape[1:]) > math.prod(size[1:]):
        return NotImplemented  # the scales of uneven shards must fit into their rows
    twin = home.copy(Stored(blank), layout)
    twin.scheme = scheme
    return FP8Weight(twin, weight.dtype)


@implements(OPERATIONS, aten.constant_pad_nd.default)
def _pad(weight: FP8Weight, pad: Any, value: Any = 0) -> Any:
    """Pads with zeros after the last rows or columns, as DTensor does to make shards even."""
    weight = with_smaller_blocks(weight)
    home = weight._home
    if home.precision == "original":
        return NotImplemented
    taken = None if home.stored is None or COPIES_ARE_DENSE in weight.__dict__ else part_taken(weight)
    nothing = weight.numel() == 0 and home.stored is not None and COPIES_ARE_DENSE not in weight.__dict__
    if (taken is None and not nothing) or value != 0 or any(pad[::2]) or min(pad) < 0 or home.layout.folded is not None:
        return NotImplemented
    flipped = home.layout.turned if taken is None else taken[1].flipped
    behind = [*pad[1::2], 0, 0, 0][: weight.dim()][::-1]  # one number per dimension
    padded = [size + more for size, more in zip(weight.shape, behind, strict=True)]
    blank = _blank(home, swapped(padded, flipped), weight.device)
    if taken is None:
        return FP8Weight(home.copy(Stored(blank), Layout(tuple(blank.shape), flipped)), weight.dtype)
    scaled, part = taken
    for whole, some in ((blank.data.view(torch.uint8), scaled.data.view(torch.uint8)), (blank.scale, scaled.scale)):
        whole[tuple(map(slice, some.shape))] = some
    return own(weight, blank, part, weight.dtype)
