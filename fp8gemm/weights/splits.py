"""Splits of a weight before its parts are sent to ranks: all parts can be sent as bytes, or none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..engines import choose, probe
from ..errors import UnsupportedError
from ..scaled import Granularity
from .copies import BLOCKS_OF_COPIES, COPIES_ARE_DENSE, with_smaller_blocks
from .dispatch import FUNCTIONS, OPERATIONS, implements
from .geometry import Layout, swapped
from .message import begins_a_block
from .packed import spec_of
from .shares import finer, part_scheme, taken
from .stored import Stored
from .weight import FP8Weight


def _splitting(func: Any) -> Callable[..., Any]:
    def split(weight: FP8Weight, *args: Any, **kwargs: Any) -> Any:
        """Views of the weight. If some start inside a scale block, copies of all of them have smaller blocks or, where
        no engine runs those, are dense: ranks agree, as each sees all views."""
        if torch.distributed.is_initialized() and weight._home.stored is None and not weight.is_meta:
            weight.scaled()  # quantized as a whole, not later on each rank
        views = OPERATIONS[None](func, (weight, *args), kwargs)
        if torch.distributed.is_initialized() and not all(map(begins_a_block, views)):
            grid = _blocks_of_all(weight, views)
            for view in views:
                view.__dict__.update({COPIES_ARE_DENSE: True} if grid is None else {BLOCKS_OF_COPIES: grid})
        return views

    return split


def _blocks_of_all(weight: FP8Weight, views: list[FP8Weight]) -> Granularity | None:
    """The largest scale blocks that none of the views cuts; None if no engine runs them."""
    home, parts = weight._home, [view.part() for view in views]
    n, k = home.layout.matrix
    runs = [[(p.rows[0], sum(p.rows)) for p in parts if p], [(p.cols[0], sum(p.cols)) for p in parts if p]]
    if None in parts or home.layout.folded is not None:
        return None
    whole = home.scheme.weight
    grid = Granularity(finer(whole.rows, runs[0], n), finer(whole.cols, runs[1], k))
    return grid if _runs(weight, grid, swapped(views[0].shape, home.layout.turned)) else None


def _runs(weight: FP8Weight, grid: Granularity, shape: tuple[int, ...]) -> bool:
    """Whether an engine runs a part ``[(E,) N, K]`` of the weight with other scale blocks."""
    home = weight._home
    spec = spec_of(shape, home.options, home.scheme, weight.dtype)
    try:
        choose(replace(spec, scheme=replace(spec.scheme, weight=grid)), probe(home.device), home.options.engine)
    except UnsupportedError:
        return False
    return True


def joined(tensors: Any, dim: int) -> FP8Weight | None:
    """Parts of one weight side by side, in FP8, as DTensor joins what belongs to a rank from each half of a fused
    weight; None for anything else."""
    first = tensors[0]
    if not all(isinstance(one, FP8Weight) and one._home is first._home for one in tensors):
        return None
    home, found = first._home, [one.part() for one in tensors]
    parts = [part for part in found if part is not None and part.flipped == found[0].flipped]
    if (
        len(parts) < len(found)
        or home.layout.folded is not None
        or home.precision == "original"
        or home.settle() is None
        or any(p.single for p in parts)
    ):
        return None
    axes = [[part.experts] if part.experts else [] for part in parts]
    along = [[*axis, part.rows, part.cols] for axis, part in zip(axes, parts, strict=True)]
    place = dim % first.dim()
    if parts[0].flipped and place >= first.dim() - 2:
        place = 2 * first.dim() - 3 - place
    if any(one[:place] + one[place + 1 :] != along[0][:place] + along[0][place + 1 :] for one in along):
        return None
    runs = [
        [(one[axis][0], sum(one[axis])) for one in (along if axis == place else along[:1])]
        for axis in range(len(along[0]))
    ]
    scaled = taken(home.scaled(), runs)
    if scaled.granularity != home.scheme.weight and not _runs(first, scaled.granularity, tuple(scaled.shape)):
        return None
    twin = home.copy(Stored(scaled), Layout(tuple(scaled.shape), parts[0].flipped))
    twin.scheme = part_scheme(home.scheme, scaled.granularity)
    return FP8Weight(twin, first.dtype)


for _split in (torch.ops.aten.split.Tensor, torch.ops.aten.split_with_sizes.default):
    OPERATIONS[_split] = _splitting(_split)


@implements(FUNCTIONS, torch.Tensor.contiguous)
def _contiguous(weight: Any, *args: Any, **kwargs: Any) -> Any:
    """A copy, which has smaller blocks or is dense if the shard cannot be sent as the bytes that it has."""
    if isinstance(weight, FP8Weight) and BLOCKS_OF_COPIES in weight.__dict__:
        return with_smaller_blocks(weight)
    dense = isinstance(weight, FP8Weight) and COPIES_ARE_DENSE in weight.__dict__
    return weight.dequantize() if dense else NotImplemented
