"""Operations that rearrange weights, applied to FP8 bytes and to their scales alike: every value stays exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import UnsupportedError
from ..scaled import GROUP_128, Granularity, ScaledTensor

# What an operation takes and gives: tensors by name; a list holds those that have yet to be merged into one.
Tensors = dict[str, Any]
Run = Callable[[Tensors], Mapping[str, Any]]


@dataclass(frozen=True)
class Tiled:
    """FP8 bytes and the scales of tiles of them, in any number of dimensions.

    ``sizes[d]`` is how many neighbors along dimension d share a scale; 0 if all do, where ``scale`` has size 1.
    ``home`` is the granularity of the weight that the tiles come from.
    """

    data: torch.Tensor
    scale: torch.Tensor
    sizes: tuple[int, ...]
    dtype: torch.dtype
    home: Granularity

    @staticmethod
    def of(weight: ScaledTensor, *, flipped: bool = False) -> Tiled:
        """The tiles of a weight ``[..., N, K]``; ``flipped`` if operations are to see ``[..., K, N]``."""
        lead = (1,) * (weight.data.dim() - 2)
        tiles = Tiled(
            weight.data.view(torch.uint8),
            weight.scale,
            (*lead, weight.granularity.rows or 0, weight.granularity.cols or 0),
            weight.data.dtype,
            weight.granularity,
        )
        return tiles.flipped() if flipped else tiles

    def flipped(self) -> Tiled:
        """The same with its last two dimensions exchanged."""
        *lead, rows, cols = self.sizes
        home = Granularity(self.home.cols, self.home.rows)
        return Tiled(self.data.mT, self.scale.mT, (*lead, cols, rows), self.dtype, home)

    def spread(self, dim: int) -> Tiled:
        """The same with a scale for each index of ``dim``."""
        size, length = self.sizes[dim], self.data.shape[dim]
        if size == 1:
            return self
        scale = self.scale.repeat_interleave(size or length, dim=dim).narrow(dim, 0, length)
        return replace(self, scale=scale, sizes=_put(self.sizes, dim, 1))

    def gathered(self, dim: int, sizes: Sequence[int]) -> Tiled:
        """Undoes ``spread`` with the first of ``sizes`` that the scales allow."""
        length = self.data.shape[dim]
        for size in sizes if self.sizes[dim] == 1 else ():
            first = self.scale.index_select(
                dim, torch.arange(0, length, size or max(length, 1), dtype=torch.int64, device=self.scale.device)
            )
            if torch.equal(first.repeat_interleave(size or length, dim=dim).narrow(dim, 0, length), self.scale):
                return replace(self, scale=first, sizes=_put(self.sizes, dim, size))
        return self

    def rows(self, spans: Sequence[tuple[int, int]]) -> Tiled:
        """The rows of each span, in order; every row has its own scale if a span does not begin or end with a tile."""
        dim = self.data.dim() - 2
        size = self.sizes[dim]
        starts = [start for start, _ in spans]
        aligned = size == 0 or all(edge % size == 0 for edge in (*starts, *(stop for _, stop in spans[:-1])))
        tiles = self if aligned else self.spread(dim)
        scale, height = tiles.scale, max(tiles.sizes[dim], 1)
        if size:
            grid = [(start // height, -(-stop // height)) for start, stop in spans]
            scale = torch.cat([scale.narrow(dim, start, stop - start) for start, stop in grid], dim=dim)
        data = [self.data.narrow(dim, start, stop - start) for start, stop in spans]
        return replace(tiles, data=data[0] if len(data) == 1 else torch.cat(data, dim=dim), scale=scale)

    @property
    def granularity(self) -> Granularity:
        """That of the last two dimensions; those before them have a scale for each index."""
        return Granularity(self.sizes[-2] or None, self.sizes[-1] or None)

    def coarse(self) -> Tiled:
        """The same with scales as coarse as those of the weight it comes from, where their values allow that."""
        tiles = self
        for dim in range(self.data.dim() - 2):
            tiles = tiles.spread(dim)
        length = self.data.shape[-2]
        rows, cols = self.home.rows or 0, self.home.cols or 0
        fitting = [rows] if rows or length % 2 else [0, length // 2]
        coarser = fitting if rows != 1 else [128] if self.home == GROUP_128 else []
        last = tiles.data.dim() - 1
        tiles = tiles.gathered(last, [] if cols == 1 else [cols]).gathered(last - 1, coarser)
        whole = tiles.scale.shape[-1] == tiles.scale.shape[-2] == 1 and cols == 0 and rows != 1
        return replace(tiles, sizes=(*tiles.sizes[:-2], 0, 0)) if whole else tiles

    def weight(self) -> ScaledTensor:
        """The weight ``[..., N, K]``, with scales as coarse as they can be."""
        tiles = self.coarse()
        return ScaledTensor(tiles.data.contiguous().view(self.dtype), tiles.scale.contiguous(), tiles.granularity)


@dataclass(frozen=True)
class Move:
    """How one kind of operation moves elements: ``touches`` dimensions whose scales it needs one by one.

    ``added`` and ``removed`` are the dimensions that its results have more or less; ``exchanged`` ones change places.
    """

    touches: tuple[int, ...] = ()
    added: int | None = None
    removed: int | None = None
    exchanged: tuple[int, int] | None = None

    def sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        after = list(sizes)
        if self.exchanged is not None:
            a, b = self.exchanged
            after[a], after[b] = after[b], after[a]
        if self.removed is not None:
            del after[self.removed]
        if self.added is not None:
            after.insert(self.added, 1)
        return tuple(after)


def _along(operation: Any) -> Move:
    return Move(touches=(operation.dim,))


# By class name, as transformers' core_model_loading has them: only what moves elements and computes nothing.
MOVES: dict[str, Callable[[Any], Move]] = {
    "Chunk": _along,
    "Split": _along,
    "Concatenate": _along,
    "Interleave": _along,
    "MergeModulelist": lambda operation: Move(added=operation.dim),
    "SplitModulelist": lambda operation: Move(touches=(operation.dim,), removed=operation.dim),
    "Transpose": lambda operation: Move(exchanged=(operation.dim0, operation.dim1)),
    "PermuteForRope": lambda _: Move(touches=(0,)),
    # Passes on a weight that comes without the scales it knows; those of FP8 weights do not come with it.
    "Inkling2LoopDequantizeExperts": lambda _: Move(),
    # Joins along a dimension of the stack, and stacks before that; and the way back.
    "ErnieFuseAndSplitTextVisionExperts": lambda operation: Move(
        touches=(operation.concat_dim - 1,), added=operation.stack_dim
    ),
    "ErnieSplitAndDecoupleTextVisionExperts": lambda operation: Move(
        touches=(operation.stack_dim, operation.concat_dim), removed=operation.stack_dim
    ),
}


def rearranged(operation: Any, run: Run, given: Tensors) -> Tensors:
    """What ``run``, a call of ``operation``, makes of tensors and ``Tiled``, a list of them being one input.

    Raises:
        UnsupportedError: the operation is not known to only move elements, so FP8 bytes cannot go through it.
    """
    tiles = [one for value in given.values() for one in _listed(value)]
    if not any(isinstance(one, Tiled) for one in tiles):
        return dict(run(given))
    kind = type(operation).__name__
    move = MOVES[kind](operation) if kind in MOVES else None
    if move is None or not all(isinstance(one, Tiled) for one in tiles):
        raise UnsupportedError(
            f"transformers' conversion {kind} is not known to move FP8 values without changing them; "
            "dequantize=True loads dense weights, to which it can be applied"
        )
    dims = tiles[0].data.dim()
    touched = {dim % dims for dim in move.touches}
    touched |= {dim for dim in range(dims) if len({one.sizes[dim] for one in tiles}) > 1}
    spread = {name: _each(value, lambda one: _spread(one, touched)) for name, value in given.items()}
    one = next(one for value in spread.values() for one in _listed(value))
    data = run({name: _each(value, lambda one: one.data) for name, value in spread.items()})
    if getattr(operation, "check_dims", False) and all(value.shape == one.data.shape for value in data.values()):
        return dict.fromkeys(data, one)  # it found the dimensions as the model has them, and did not exchange them
    scale = run({name: _each(value, lambda one: one.scale) for name, value in spread.items()})
    sizes = move.sizes(one.sizes)
    home = one.home
    if move.exchanged is not None and {dim % dims for dim in move.exchanged} == {dims - 1, dims - 2}:
        home = Granularity(home.cols, home.rows)
    return {
        name: _paired(
            value, scale[name], lambda data, scale: Tiled(data, _grid(scale, data, sizes), sizes, one.dtype, home)
        )
        for name, value in data.items()
    }


def interleaved(weight: ScaledTensor) -> ScaledTensor:
    """A stack ``[E, 2I, K]`` of gate rows, then up rows, with the rows taken from both in turn."""
    tiles = Tiled.of(weight).spread(weight.data.dim() - 2)
    half = weight.shape[-2] // 2
    rows = torch.arange(2 * half, dtype=torch.int64, device=weight.device).view(2, half).T.flatten()
    return replace(tiles, data=tiles.data[..., rows, :], scale=tiles.scale[..., rows, :]).weight()


def _grid(scale: torch.Tensor, data: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """The scale with a dimension for each of ``data``; transformers 5.19 drops those of size 1."""
    if scale.dim() == data.dim():
        return scale
    return scale.reshape([-(-length // size) if size else 1 for length, size in zip(data.shape, sizes, strict=True)])


def _spread(tiles: Tiled, dims: set[int]) -> Tiled:
    for dim in sorted(dims):
        tiles = tiles.spread(dim)
    return tiles


def _put(sizes: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    after = list(sizes)
    after[dim] = size
    return tuple(after)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _each(value: Any, function: Callable[[Any], Any]) -> Any:
    return [function(one) for one in value] if isinstance(value, list) else function(value)


def _paired(first: Any, second: Any, function: Callable[[Any, Any], Any]) -> Any:
    if isinstance(first, list):
        return [function(a, b) for a, b in zip(first, second, strict=True)]
    return function(first, second)
