"""Experts on disk: scales shared by several matrices, and the stacked names of per-expert tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..errors import CheckpointError
from ..scaled import BLOCK_128, GROUP_128, ROW, TENSOR, Granularity, ScaledTensor, Scheme
from .base import STACKED, Contents, Layer

_EXPERT = re.compile(
    r"^(?P<block>.*\bexperts)\.(?P<index>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
# Mixtral's names: w1 is gate, w3 is up, w2 is down.
_ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_STACKED_NAMES = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
_FUSED_SCALE = re.compile(r"^(?P<block>.*\bexperts)\.(?P<part>gate_up_proj|down_proj)(?P<suffix>[._]\w*)$")

GranularityOf = Callable[[tuple[int, ...], tuple[int, ...], Sequence[Granularity]], "Granularity | None"]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A stacked weight ``[E, N, K]``: the rows of expert e are those of the canonical names ``parts[e]``, in order."""

    name: str
    parts: tuple[tuple[str, ...], ...]


def stacks(names: Iterable[str]) -> dict[str, Stack]:
    """The stacked weights that per-expert names form: gate rows first, then up; only if no expert is missing."""
    found: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in names:
        if match := _EXPERT.match(name):
            role = _ROLES[match["part"]]
            found[f"{match['block']}.{_STACKED_NAMES[role]}"][int(match["index"])][role] = name
    result = {}
    for stacked, experts in found.items():
        roles = ("gate", "up") if stacked.endswith("gate_up_proj") else ("down",)
        if sorted(experts) == list(range(len(experts))) and all(set(parts) == set(roles) for parts in experts.values()):
            parts = tuple(tuple(experts[index][role] for role in roles) for index in range(len(experts)))
            result[stacked] = Stack(name=stacked, parts=parts)
    return result


def join_rows(parts: Sequence[ScaledTensor]) -> ScaledTensor:
    """Weights ``[N1, K], [N2, K], ...`` as one ``[N1 + N2 + ..., K]``: the same bytes and values.

    Per-tensor scales become one scale for the rows of each part, or one per row if the parts differ in height; row
    blocks that do not end where a part ends become one scale per row and block of columns.

    Raises:
        CheckpointError: widths, dtypes or block widths differ.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if len({(part.data.dtype, part.shape[-1], part.granularity.cols) for part in parts}) > 1:
        found = ", ".join(f"{part.data.dtype} {list(part.shape)} {part.granularity}" for part in parts)
        raise CheckpointError(f"weights that differ in dtype, width or block width cannot be joined: {found}")
    granularity = first.granularity
    heights = {part.shape[-2] for part in parts}
    if len(heights) == 1 and all(part.granularity == TENSOR for part in parts):
        data, scale = (torch.cat(tensors, dim=-2) for tensors in zip(*((p.data, p.scale) for p in parts), strict=True))
        return ScaledTensor(data, scale, Granularity(heights.pop(), None))
    aligned = all(part.granularity == granularity for part in parts) and all(
        granularity.rows is not None and part.shape[-2] % granularity.rows == 0 for part in parts[:-1]
    )
    joined = granularity if aligned else Granularity(1, granularity.cols)
    scales = [part.scale if aligned else row_scale(part.scale, part.granularity, part.shape) for part in parts]
    return ScaledTensor(torch.cat([part.data for part in parts], dim=-2), torch.cat(scales, dim=-2), joined)


def slice_rows(weight: ScaledTensor, start: int, stop: int) -> ScaledTensor:
    """Rows ``start`` to ``stop`` of a weight ``[N, K]``: undoes ``join_rows``, possibly with coarser scales."""
    rows, cols = weight.granularity.rows, weight.granularity.cols
    data = weight.data[start:stop]
    if rows is None:
        return ScaledTensor(data, weight.scale, weight.granularity)
    if start % rows:
        scale = row_scale(weight.scale, weight.granularity, weight.shape)[start:stop]
        return ScaledTensor(data, scale, Granularity(1, cols))
    scale = weight.scale[start // rows : -(-stop // rows)]
    whole = cols is None and rows > 1 and scale.shape[0] == 1
    return ScaledTensor(data, scale, TENSOR if whole else weight.granularity)


def coarsened(weight: ScaledTensor) -> ScaledTensor:
    """A weight ``[N, K]`` with 1x128 scales as 128x128 blocks, if the scales are constant within each block."""
    if weight.granularity != GROUP_128:
        return weight
    blocks = weight.scale[::128]
    repeated = blocks.repeat_interleave(128, dim=0)[: weight.shape[0]]
    return ScaledTensor(weight.data, blocks, BLOCK_128) if torch.equal(repeated, weight.scale) else weight


def row_scale(scale: torch.Tensor, granularity: Granularity, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Scales repeated so that every row has its own, ``Granularity(1, cols)``; column blocks are unchanged."""
    n = shape[-2]
    rows, _ = granularity.block(shape)
    return scale.repeat_interleave(rows, dim=-2)[..., :n, :] if rows > 1 else scale


def fused_scale_owner(contents: Contents, key: str, *, reverse: bool = False) -> str | None:
    """The fused scale of the per-expert weight ``key``; with ``reverse``, the non-FP8 expert weight of a fused scale.

    transformers saves per-expert weights together with the stacked scales of its own experts, also for experts that
    it left in bfloat16.
    """
    if reverse:
        match = _FUSED_SCALE.match(key)
        if match is None or match["suffix"] not in (*STACKED.scales, *STACKED.input_scales):
            return None
        parts = [part for part, role in _ROLES.items() if _STACKED_NAMES[role] == match["part"]]
        candidates = (f"{match['block']}.0.{part}.weight" for part in parts)
        return next((name for name in candidates if _is_wide(contents, name)), None)
    expert = _EXPERT.match(key)
    if expert is None:
        return None
    stacked = f"{expert['block']}.{_STACKED_NAMES[_ROLES[expert['part']]]}"
    return next((stacked + suffix for suffix in STACKED.scales if stacked + suffix in contents.tensors), None)


def _is_wide(contents: Contents, key: str) -> bool:
    info = contents.tensors.get(key)
    return info is not None and info.dtype.is_floating_point and info.dtype.itemsize > 1


def fused_layer(
    contents: Contents,
    name: str,
    key: str,
    dtype: torch.dtype,
    fused: str,
    hints: Sequence[Granularity],
    granularity_of: GranularityOf,
) -> Layer:
    """The layer of one expert whose scale is part of the stacked scale ``fused``.

    Raises:
        CheckpointError: the shapes do not fit.
    """
    match = _EXPERT.match(key)
    assert match is not None
    role, index = _ROLES[match["part"]], int(match["index"])
    shape, grid = contents.tensors[key].shape, contents.tensors[fused].shape
    half = None if role == "down" else int(role == "up")
    found = _share(shape, grid, half, hints, granularity_of) if grid and index < grid[0] else None
    if found is None:
        raise CheckpointError(
            f"{fused} has shape {list(grid)}, which cannot contain the scale of {key} of shape {list(shape)}"
        )
    granularity, take = found
    return Layer(
        name=name,
        weight=key,
        shape=shape,
        dtype=dtype,
        scheme=Scheme(weight=granularity, activation=None),
        scale=fused,
        scale_dtype=contents.tensors[fused].dtype,
        part=partial(_take, index=index, take=take),
    )


def _take(scale: torch.Tensor, *, index: int, take: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return take(scale[index])


def _share(
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    half: int | None,
    hints: Sequence[Granularity],
    granularity_of: GranularityOf,
) -> tuple[Granularity, Callable[[torch.Tensor], torch.Tensor]] | None:
    """The granularity of one expert's matrix, and how to extract its scales from the expert's part ``grid[1:]``."""
    own = grid[1:]
    n = shape[0]
    if half is None or torch.Size(own).numel() == 1:
        granularity = granularity_of(shape, own, hints)
        return None if granularity is None else (granularity, _whole)
    rows = own[0] // 2
    granularity = granularity_of(shape, (rows, *own[1:]), hints) if own[0] % 2 == 0 else None
    if granularity is not None:
        return granularity, partial(_rows, start=half * rows, stop=(half + 1) * rows)
    for hint in hints:
        # Blocks over gate and up together: up begins inside a block, so each of its rows gets its own scale.
        if hint.scale_shape((2 * n, shape[1])) == own and hint.cols is not None:
            spread = partial(_spread_rows, granularity=hint, shape=(2 * n, shape[1]), start=half * n, stop=half * n + n)
            return Granularity(1, hint.cols), spread
    return None


def _whole(scale: torch.Tensor) -> torch.Tensor:
    return scale


def _rows(scale: torch.Tensor, *, start: int, stop: int) -> torch.Tensor:
    return scale[start:stop]


def _spread_rows(
    scale: torch.Tensor, *, granularity: Granularity, shape: tuple[int, int], start: int, stop: int
) -> torch.Tensor:
    return row_scale(scale, granularity, shape)[start:stop]


def halves(layer: Layer, grid: tuple[int, ...], hints: Sequence[Granularity]) -> Layer | None:
    """A stacked ``gate_up_proj [E, 2I, K]`` whose gate and up have separate scales; None if ``grid`` does not fit that.

    One scale per half becomes one per row; blocks that restart at the middle become one scale per row and column block.
    """
    experts, n, k = layer.shape
    if n % 2:
        return None
    half = (experts, n // 2, k)
    for granularity in (*hints, TENSOR):
        rows, cols = granularity.scale_shape(half)[1:]
        if grid in ((experts, 2 * rows, cols), (experts, 2 * rows * cols) if rows * cols == 1 else grid[:0]):
            spread = partial(_spread_halves, granularity=granularity, half=half, rows=rows, cols=cols)
            target = ROW if granularity.cols is None else Granularity(1, granularity.cols)
            return replace(layer, scheme=Scheme(weight=target, activation=None), part=spread)
    return None


def _spread_halves(
    scale: torch.Tensor, *, granularity: Granularity, half: tuple[int, int, int], rows: int, cols: int
) -> torch.Tensor:
    parts = scale.reshape(half[0], 2, rows, cols)
    return torch.cat([row_scale(parts[:, index], granularity, half) for index in (0, 1)], dim=-2)
