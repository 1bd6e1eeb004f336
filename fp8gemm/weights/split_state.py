"""State dicts of weights that are split among ranks: each rank's bytes and scales, as torch.distributed.checkpoint
saves and loads them.

Files have the same tensors as those of an unsplit model, FP8 bytes and the scales of the whole weight, whichever number
of ranks writes or reads them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import UnsupportedError
from ..scaled import FP8_DTYPES, Granularity, ScaledTensor
from .geometry import Layout, swapped
from .home import Home
from .sharding import Sharded, held, repeated, whole_scheme
from .shares import Runs, along, is_split, layout_of, like, parts_of, scales_of, share, spread, whole, whole_layout
from .stored import Stored
from .weight import FP8Weight, Geometry


class Entry(FP8Weight):
    """This rank's part of a weight in a state dict, which torch.distributed.checkpoint saves and loads as bytes.

    Loading fills memory of its own; ``load_state_dict`` gives it to the model.
    """

    _bytes: torch.Tensor  # FP8, in the parameter's own layout
    _runs: list[Runs]

    def like(
        self, geometry: Geometry | None = None, *, home: Home | None = None, dtype: torch.dtype | None = None
    ) -> FP8Weight:
        """An alias, a copy or a cast of an entry is an entry; a view of another geometry is not."""
        own = (tuple(self.size()), self.stride(), self.offset)
        if geometry not in (None, own):
            return super().like(geometry, home=home, dtype=dtype)
        twin = Entry(home or self._home, dtype or self.dtype)
        twin._bytes = self._bytes if home is None else home.layout.shaped(home.scaled().data)
        twin._runs = self._runs
        return twin

    @staticmethod
    def of(weight: FP8Weight, parameter: Any) -> Entry:
        """The part of the DTensor ``parameter`` as it is now."""
        home = weight._home
        home.owned = True
        stored = home.settle()
        assert stored is not None
        scaled = _unpadded(weight, stored.scaled())
        own = home.copy(Stored(scaled), Layout(tuple(scaled.shape), home.layout.turned, _folded(weight)))
        own.activity, own.owned = home.activity, True
        entry = Entry(own, weight.dtype)
        entry._bytes = own.layout.shaped(scaled.data)
        entry._runs = [along(parameter, dim)[0] for dim in range(parameter.dim())]
        return entry

    def __create_write_items__(self, key: str, whole: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self._bytes.dtype)
        return [
            WriteItem(
                index=MetadataIndex(key, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=whole.size()),
            )
            for chunk in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        self._bytes = self._bytes.clone()  # to be loaded into
        return self._chunks()

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        part = self._bytes
        for dim, (offset, runs) in enumerate(zip(index.offset, self._runs, strict=True)):
            before = 0
            for first, end in runs:
                if first == offset:
                    part = part.narrow(dim, before, end - first)
                before += end - first
        return part

    def _chunks(self) -> list[Any]:
        """What lies together in the whole weight, as offsets and sizes."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        chunks: list[tuple[list[int], list[int]]] = [([], [])]
        for runs in self._runs:
            chunks = [([*at, first], [*size, end - first]) for at, size in chunks for first, end in runs]
        return [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in chunks]


class Differing(torch.Tensor):
    """Scales that should be the same on several ranks, and are not: they can be loaded into, but not saved.

    What is made of them has no such class, but is NaN.
    """

    _key: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __create_write_items__(self, key: str, whole: Any) -> Any:
        raise UnsupportedError(
            f"{self._key}: the parts of this weight do not come from one weight, or were written to after it was "
            "split: their scales, which ranks share, differ; take full_tensor() of it, or write before it is split"
        )


def _unpadded(weight: FP8Weight, scaled: ScaledTensor) -> ScaledTensor:
    part = weight.part()
    found = scaled if part is None or part.whole(weight._home.layout) else part.take(scaled)
    if 0 in weight.shape:
        grid, layout = scaled.granularity, weight._home.layout
        shape = (0, *scaled.shape[1:]) if layout.folded is not None else swapped(weight.shape, layout.turned)
        blank = scaled.scale.new_ones(grid.scale_shape(shape))
        return ScaledTensor(scaled.data.view(torch.uint8).new_empty(shape).view(scaled.data.dtype), blank, grid)
    assert found is not None
    return found


def _folded(weight: FP8Weight) -> tuple[int, ...] | None:
    return None if weight._home.layout.folded is None else tuple(weight.shape)


def entries(parameter: Any, key: str) -> dict[str, Any]:
    """What a state dict has of a weight that is split: its bytes, and the scales of the whole weight.

    Where several ranks have the same scale, they compare it, which is a collective call.
    """
    entry = Entry.of(held(parameter), parameter)
    return {key: like(parameter, entry).detach(), f"{key}_scale": _scale(entry, parameter, key)}


def _scale(entry: Entry, parameter: Any, key: str) -> torch.Tensor:
    """The scales of the whole weight: a DTensor if they are split as the weight is, else all of them."""
    home, layout = entry._home, whole_layout(parameter)
    grid, parts = whole_scheme(home.scheme).weight, parts_of(parameter, layout)
    shape = grid.scale_shape(layout.shape)
    own = home.scaled().scale
    if not isinstance(home.scheme, Sharded) and (placements := _placements(parameter, layout, shape)):
        made: torch.Tensor = type(parameter.data).from_local(
            own.clone(),
            parameter.device_mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, dtype=torch.uint8, device="meta").stride(),
        )
        return made
    return _agreed(own, parts, home.scheme.weight, grid, layout, parameter, key)


def _placements(parameter: Any, layout: Layout, shape: tuple[int, ...]) -> list[Any]:
    """How scales are split that are split as the weight is; empty if ranks share some."""
    found = []
    for placement in parameter.placements:
        dim = getattr(placement, "dim", None)
        if dim is not None:
            dim %= parameter.dim()
            if layout.folded is None and layout.turned and dim >= parameter.dim() - 2:
                dim = 2 * parameter.dim() - 3 - dim
            if shape[dim] != layout.shape[dim]:
                return []
            factor = getattr(placement, "split_factor", None)
            placement = type(placement)(dim, **({} if factor is None else {"split_factor": factor}))
        found.append(placement)
    return found


def _agreed(
    own: torch.Tensor, parts: list[Runs], fine: Granularity, grid: Granularity, layout: Layout, parameter: Any, key: str
) -> torch.Tensor:
    """All scales ``grid`` of a weight, each from a rank that has it in its blocks ``fine``."""
    mesh = parameter.device_mesh
    blank = torch.zeros(grid.scale_shape(layout.shape), dtype=torch.float32, device=mesh.device_type)
    places = torch.arange(blank.numel(), dtype=torch.int64, device="cpu").view(blank.shape)
    mine = scales_of(repeated(places, layout.shape, grid, fine), fine, parts).flatten().to(blank.device)
    given = own.flatten().to(blank.device) if all(parts) else blank.flatten()[:0]
    mine = mine[: len(given)]
    blank.view(-1)[mine] = given
    _largest(blank, mesh)
    differs = (blank.view(-1)[mine] != given).any().to(torch.int32)
    _largest(differs, mesh)
    scale = blank.to(own.device)
    if differs.item():
        scale = torch.full_like(scale, math.nan).as_subclass(Differing)
        scale._key = key
    return scale


def _largest(values: torch.Tensor, mesh: Any) -> None:
    """Replaces values by the largest of all ranks."""
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))


def loaded(parameter: Any, data: Any, scale: torch.Tensor | None, input_scale: torch.Tensor | None) -> FP8Weight:
    """This rank's part of what a state dict has for a split weight: bytes with scales, a weight, or dense values.

    Values that are themselves split are gathered first, so that they are quantized as a whole: a collective call.
    """
    weight = _loaded(parameter, data, scale)
    own = held(parameter)._home
    weight._home.trains, weight._home.activity = own.trains, own.activity
    weight._home.input_scale = own.input_scale if input_scale is None else input_scale.detach().to(own.device)
    return weight


def _loaded(parameter: Any, data: Any, scale: torch.Tensor | None) -> FP8Weight:
    own, layout = held(parameter), whole_layout(parameter)
    home, grid = own._home, whole_scheme(own._home.scheme)
    alike = is_split(data) and data.placements == parameter.placements and data.device_mesh == parameter.device_mesh
    local = held(data)
    if alike and isinstance(local, FP8Weight) and not isinstance(local, Entry):
        return local.to(own.device, own.dtype).clone()  # type: ignore[return-value]
    codes = local._bytes if isinstance(local, Entry) else local if local.dtype in FP8_DTYPES else None
    if codes is not None and alike:
        assert scale is not None
        part = _bytes(codes, scale, parameter, layout)
        own_layout = layout_of(parameter, layout, parts_of(parameter, layout))
        return FP8Weight(Home(home.options, own_layout, stored=Stored(part), scheme=home.scheme), own.dtype)
    if codes is not None:
        assert scale is not None
        plain = layout.plain(whole(data)).contiguous()
        scaled = ScaledTensor(plain, whole(scale).to(plain.device, torch.float32), grid.weight)
        data = FP8Weight(Home(home.options, layout, stored=Stored(scaled), scheme=grid), own.dtype)
    else:
        data = whole(data)
    if isinstance(data, FP8Weight) and data._home.scheme.weight == grid.weight and data.is_whole():
        return held(share(data, parameter, home.scheme.weight))  # type: ignore[no-any-return]
    dense = data.dequantize() if isinstance(data, FP8Weight) else data
    return held(spread(dense.to(own.device, own.dtype), parameter))  # type: ignore[no-any-return]


def _bytes(codes: torch.Tensor, scale: torch.Tensor, parameter: Any, layout: Layout) -> ScaledTensor:
    """This rank's bytes with its own scales, from all or from its part of those of the whole weight."""
    home = held(parameter)._home
    fine, grid = home.scheme.weight, whole_scheme(home.scheme).weight
    if is_split(scale):
        own = held(scale).to(torch.float32, copy=True)
    else:
        parts = parts_of(parameter, layout)
        own = scales_of(repeated(scale.to(torch.float32), layout.shape, grid, fine), fine, parts)
    plain = layout.plain(codes).contiguous() if layout.folded is None else codes.reshape(-1, layout.shape[1])
    return ScaledTensor(plain.clone().to(home.device), own.to(home.device), fine)
