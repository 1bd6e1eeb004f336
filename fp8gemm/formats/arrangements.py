"""Weights that files hold in another shape than the model: transposed, in groups, scaled along other dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import CheckpointError
from ..scaled import ROW, Granularity
from .tiles import tiled_shape, untiled


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How a weight is stored that a file holds in another shape than the model does.

    ``shape`` and ``granularity`` are those in the model; ``data`` brings the stored bytes into that shape, and
    ``scale`` the stored scales into that granularity's grid.
    """

    shape: tuple[int, ...]
    granularity: Granularity
    data: Callable[[torch.Tensor], torch.Tensor] | None = None
    scale: Callable[[torch.Tensor], torch.Tensor] | None = None


def scaled_in_tiles(shape: tuple[int, ...], granularity: Granularity, key: str, stored: tuple[int, ...]) -> Arrangement:
    """``[N, K]`` as in the model, whose scales ``key`` of shape ``stored`` are in the order of tensor cores' tiles.

    Raises:
        CheckpointError: these are not as many as the tiles of such a weight hold.
    """
    rows, groups = granularity.scale_shape(shape)
    expected = tiled_shape(rows, groups)
    if math.prod(stored) != math.prod(expected):
        raise CheckpointError(
            f"{key} must hold scales in tiles of 128 x 4: {list(expected)} for a weight of shape {list(shape)}, found "
            f"{list(stored)}"
        )
    return Arrangement(shape=shape, granularity=granularity, scale=partial(untiled, rows=rows, groups=groups))


def transposed(shape: tuple[int, ...]) -> Arrangement:
    """``[K, N]`` with scales ``[1, N]``: as a matrix product reads its second operand."""
    return Arrangement(shape=(shape[1], shape[0]), granularity=ROW, data=torch.t)


def grouped(shape: tuple[int, ...], grid: tuple[int, ...]) -> Arrangement | None:
    """``[N, G, g, ...]`` with scales ``[N, G, 1, ...]``: the second dimension of the weight cut into G groups."""
    if len(shape) < 3 or grid != (*shape[:2], 1, *shape[3:]) or min(shape[1:3]) < 2:
        return None
    whole = (shape[0], shape[1] * shape[2], *shape[3:])
    if len(shape) == 3:
        return Arrangement(shape=whole, granularity=Granularity(1, shape[2]), data=partial(_reshape, shape=whole))
    scale = partial(_expand, shape=shape, whole=whole)
    return Arrangement(shape=whole, granularity=Granularity(1, 1), data=partial(_reshape, shape=whole), scale=scale)


def flattened(shape: tuple[int, ...], grid: tuple[int, ...], cols: int) -> Arrangement | None:
    """``[N, K]`` with scales ``[N * ceil(K / cols)]``, row by row."""
    granularity = Granularity(1, cols)
    if len(shape) != 2 or len(grid) != 1 or grid[0] != math.prod(granularity.scale_shape(shape)):
        return None
    return Arrangement(shape=shape, granularity=granularity)


def spread(shape: tuple[int, ...], grid: tuple[int, ...]) -> Arrangement | None:
    """Scales that fit a weight of three dimensions or more as torch broadcasts them, such as a convolution's."""
    if len(shape) < 3 or len(shape) != len(grid) or any(g not in (1, n) for n, g in zip(shape, grid, strict=True)):
        return None
    rows, cols = (None if size == 1 else 1 for size in grid[-2:])
    granularity = Granularity(rows, cols)
    whole = granularity.scale_shape(shape)
    return Arrangement(shape=shape, granularity=granularity, scale=partial(_expand, shape=whole, whole=whole))


def _reshape(data: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
    return data.reshape(shape)


def _expand(scale: torch.Tensor, *, shape: tuple[int, ...], whole: tuple[int, ...]) -> torch.Tensor:
    return scale.expand(shape).reshape(whole)
