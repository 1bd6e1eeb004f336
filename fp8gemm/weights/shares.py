"""FP8 weights in DTensors: what each rank holds of a whole weight, as a DTensor's placements say."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..scaled import Granularity, ScaledTensor, Scheme
from .geometry import Layout
from .home import Home
from .precision import refuse_original
from .sharding import Sharded, refined, whole_scheme
from .stored import Stored
from .weight import FP8Weight

Runs = list[tuple[int, int]]  # consecutive elements along a dimension, as (first, end)


def is_split(parameter: Any) -> bool:
    """Whether it is a DTensor; does not import torch.distributed.tensor."""
    return hasattr(parameter, "_local_tensor")


def whole(parameter: Any) -> torch.Tensor:
    """The whole tensor of a DTensor, from all ranks of its mesh: a collective call. On meta, nothing is sent."""
    if not is_split(parameter):
        return parameter  # type: ignore[no-any-return]
    if parameter.is_meta:
        return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return parameter.detach().full_tensor()  # type: ignore[no-any-return]


def like(parameter: Any, local: torch.Tensor) -> nn.Parameter:
    """A parameter with this rank's ``local`` tensor that is distributed as the DTensor ``parameter`` is."""
    made = type(parameter.data).from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    frozen = isinstance(local, FP8Weight)
    return nn.Parameter(made, requires_grad=parameter.requires_grad and not frozen)


def share(weight: FP8Weight, parameter: Any, grid: Granularity | None = None) -> nn.Parameter:
    """This rank's share of a whole ``weight``, distributed as the DTensor ``parameter`` is; nothing is sent.

    It is put on the device of ``parameter``, or, if that is on meta and ``weight`` is not, of its mesh. Where a rank's
    share starts or ends inside a scale block, all get smaller blocks with the same scales: ``grid`` or, by default, the
    largest that are not cut.

    Raises:
        UnsupportedError: the placements do not split a matrix or a stack along its own dimensions.
    """
    home, device, layout = weight._home, device_of(parameter, weight), weight._home.layout
    refuse_original(home)
    mine = parts_of(parameter, layout)
    own = layout_of(parameter, layout, mine)
    scaled = taken(weight.scaled(), mine, grid or _grid(parameter, layout, home.scheme.weight))
    scaled = ScaledTensor(
        scaled.data.view(torch.uint8).to(device).view(scaled.data.dtype), scaled.scale.to(device), scaled.granularity
    )
    twin = home.copy(Stored(scaled), own)
    twin.scheme, twin.owned = part_scheme(home.scheme, scaled.granularity), True
    if home.input_scale is not None:
        twin.input_scale = home.input_scale.to(device)
    return like(parameter, FP8Weight(twin, weight.dtype))


def parts_of(parameter: Any, layout: Layout) -> list[Runs]:
    """What this rank holds of the weight ``[(E,) N, K]`` in a DTensor, by the layout of the whole weight."""
    runs = [along(parameter, dim)[0] for dim in range(parameter.dim())]
    if layout.folded is not None:
        return [runs[0], [(0, layout.shape[1])]]
    return [*runs[:-2], runs[-1], runs[-2]] if layout.turned else runs


def layout_of(parameter: Any, layout: Layout, parts: list[Runs]) -> Layout:
    """The layout of this rank's part of a weight."""
    shape = tuple(sum(end - first for first, end in runs) for runs in parts)
    if layout.folded is None:
        return Layout(shape, layout.turned)
    size = tuple(parameter._local_tensor.shape)
    if len(layout.shape) != 2 or size[1:] != tuple(layout.folded[1:]):
        raise UnsupportedError(
            f"an FP8 weight of shape {layout.folded} can be split among ranks along its first dimension only"
        )
    return Layout(shape, layout.turned, size)


def _grid(parameter: Any, layout: Layout, grid: Granularity) -> Granularity:
    """The largest scale blocks that no rank's part cuts."""
    rows, cols = (-1, -2) if layout.turned else (-2, -1)
    if layout.folded is not None:
        rows, cols = 0, -1
    ranks = [[run for runs in along(parameter, dim % parameter.dim()) for run in runs] for dim in (rows, cols)]
    return Granularity(finer(grid.rows, ranks[0], layout.shape[-2]), finer(grid.cols, ranks[1], layout.shape[-1]))


def device_of(parameter: Any, values: torch.Tensor) -> torch.device:
    """Where this rank's part of ``values`` belongs."""
    found: torch.device = parameter._local_tensor.device
    return torch.device(parameter.device_mesh.device_type) if found.type == "meta" and not values.is_meta else found


def spread(values: torch.Tensor, parameter: Any) -> nn.Parameter:
    """Dense ``values``, which every rank has, distributed as the DTensor ``parameter`` is; nothing is sent.

    If that is in FP8, the values are quantized as a whole.
    """
    from torch.distributed.tensor import distribute_tensor

    former = parameter._local_tensor
    if isinstance(former, FP8Weight):
        home, layout = former._home, whole_layout(parameter)
        own = Home(
            home.options, layout, dense=values.contiguous(), scheme=whole_scheme(home.scheme), trains=home.trains
        )
        return share(FP8Weight(own, former.dtype), parameter)
    placed = distribute_tensor(values.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)
    return nn.Parameter(placed, requires_grad=parameter.requires_grad)


def whole_layout(parameter: Any) -> Layout:
    """The layout of the whole weight of which a rank holds a part."""
    own = parameter._local_tensor._home.layout
    if own.folded is None:
        return Layout.of(parameter.shape, turned=own.turned)
    return Layout((parameter.shape[0], own.shape[1]), own.turned, tuple(parameter.shape))


def part_scheme(scheme: Scheme, grid: Granularity) -> Scheme:
    """The scheme of a share whose scale blocks are ``grid``; it remembers that of the whole weight."""
    if grid == scheme.weight:
        return scheme
    known = {name: getattr(scheme, name) for name in ("activation", "static", "scale_format")}
    return Sharded(weight=grid, **known, whole=whole_scheme(scheme))


def along(parameter: Any, dim: int) -> list[Runs]:
    """The elements along a dimension of a DTensor that each rank holds; this rank's are first."""
    mesh, cuts = parameter.device_mesh, []
    for place, placement in enumerate(parameter.placements):
        if placement.is_partial():
            raise UnsupportedError("a weight whose placement is Partial has no values of its own")
        if getattr(placement, "dim", None) is not None and placement.dim % parameter.dim() == dim:
            cuts.append((mesh.size(place), mesh.get_local_rank(place), getattr(placement, "split_factor", 1)))
    return _runs(parameter.shape[dim], tuple(cuts))


@lru_cache(maxsize=1024)
def _runs(size: int, cuts: tuple[tuple[int, int, int], ...]) -> list[Runs]:
    """As torch splits: into ``split_factor`` groups, and each of those among the ranks."""
    every, mine = [torch.arange(size, dtype=torch.int64, device="cpu")], 0
    for ranks, own, factor in cuts:
        parts = []
        for indices in every:
            groups = [_chunks(group, ranks) for group in _chunks(indices, factor)]
            parts += [torch.cat(rank) for rank in zip(*groups, strict=True)]
        every, mine = parts, mine * ranks + own
    return [consecutive(part.tolist()) for part in (every[mine], *every[:mine], *every[mine + 1 :])]


def _chunks(indices: torch.Tensor, count: int) -> list[torch.Tensor]:
    parts = list(indices.chunk(count))
    return [*parts, *[indices[:0]] * (count - len(parts))]


def consecutive(indices: list[int]) -> Runs:
    """Indices as ranges of consecutive ones.

    Example:
        >>> consecutive([4, 5, 6, 9])
        [(4, 7), (9, 10)]
    """
    runs: Runs = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def taken(weight: ScaledTensor, parts: list[Runs], grid: Granularity | None = None) -> ScaledTensor:
    """The parts of ``[(E,) N, K]`` that are named in each dimension, in new memory, with scale blocks of ``grid``: by
    default the largest that they do not cut."""
    if grid is None:
        (*_, n, k), (*_, rows, cols) = weight.shape, parts
        grid = Granularity(finer(weight.granularity.rows, rows, n), finer(weight.granularity.cols, cols, k))
    data = weight.data.view(torch.uint8)
    for dim, runs in enumerate(parts):
        data = _cut(data, dim, runs)
    copied = data.clone(memory_format=torch.contiguous_format).view(weight.data.dtype)
    return ScaledTensor(copied, scales_of(refined(weight, grid).scale, grid, parts), grid)


def scales_of(scale: torch.Tensor, grid: Granularity, parts: list[Runs]) -> torch.Tensor:
    """The scales, in new memory, of parts of a weight ``[(E,) N, K]`` whose scale blocks are ``grid``."""
    *stack, rows, cols = parts
    for dim, runs in enumerate(stack):
        scale = _cut(scale, dim, runs)
    for dim, block, runs in ((-2, grid.rows, rows), (-1, grid.cols, cols)):
        if block is not None:
            scale = _cut(scale, dim, [(first // block, -(-end // block)) for first, end in runs] or [(0, 1)])
    return scale.clone(memory_format=torch.contiguous_format)


def _cut(values: torch.Tensor, dim: int, runs: Runs) -> torch.Tensor:
    parts = [values.narrow(dim, first, end - first) for first, end in runs]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0] if parts else values.narrow(dim, 0, 0)


def finer(block: int | None, runs: Runs, total: int) -> int | None:
    """The largest block that divides ``block`` and that no range cuts; the last block of a weight may be smaller.

    Example:
        >>> finer(128, [(0, 96), (96, 192)], 192), finer(128, [(128, 192)], 192)
        (32, 128)
    """
    if block is None:
        return None
    return math.gcd(block, *(bound for run in runs for bound in run if bound != total))
