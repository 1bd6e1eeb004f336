"""Copies of weights by their bytes: casts, moves, clones and ``copy_``."""

from __future__ import annotations

from typing import Any

import torch

from .. import native
from ..scaled import Granularity, ScaledTensor
from .dispatch import FUNCTIONS, OPERATIONS, implements
from .geometry import Layout, Part
from .home import Home
from .sharding import Sharded, refined
from .shares import part_scheme
from .stored import Stored, lock
from .values import read_of
from .weight import FP8Weight

aten = torch.ops.aten
COPIES_ARE_DENSE = "_copies_are_dense"  # attribute of views that cannot be copied as bytes on all ranks
BLOCKS_OF_COPIES = "_blocks_of_copies"  # attribute of views whose copies have smaller scale blocks, on all ranks


@implements(FUNCTIONS, torch.Tensor.detach)
def _detach(weight: Any) -> Any:
    """A shortcut past the dispatcher, whose first operation on a subclass makes torch import 40 MB of
    torch.distributed."""
    if not isinstance(weight, FP8Weight) or not native.plain() or torch.compiler.is_compiling():
        return NotImplemented
    twin = weight.like()
    twin._source = weight.__dict__.get("_source", weight)
    return twin


def count_write(weight: FP8Weight) -> None:
    """Lets autograd see a write to a result of ``_detach``: torch's own detach shares the version counter."""
    source = weight.__dict__.get("_source")
    if source is not None and not source.is_inference():
        torch.autograd.graph.increment_version(source)


@implements(OPERATIONS, aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _same(weight: FP8Weight) -> FP8Weight:
    return weight.like()


@implements(OPERATIONS, aten._to_copy.default)
def _to_copy(
    weight: FP8Weight,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **others: Any,
) -> Any:
    """A cast shares the bytes; a move copies them, except to meta."""
    home, dtype = weight._home, dtype or weight.dtype
    device = weight.device if device is None else torch.device(device)
    unmoved = device == weight.device
    if is_8_bits(dtype):
        dtype = weight.dtype
    if not dtype.is_floating_point or (not unmoved and not weight.is_whole()):
        return NotImplemented
    with lock():
        if not unmoved:
            return weight.like(home=_moved_home(home, dtype, device), dtype=dtype).fresh()
        if home.stored is not None and home.settle() is None:
            return NotImplemented  # a temporary copy that was written to is cast by its exact values
        return weight.like(home=_cast_home(home, dtype), dtype=dtype).fresh()


def is_8_bits(dtype: Any) -> bool:
    """Whether a dtype has 8 bits. Such a cast is ignored: the weight is FP8 already and would lose its scales."""
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize == 1


def _converts(func: Any) -> None:
    """Registers a method of torch.Tensor that casts or moves; a cast to FP8 leaves the weight as it is."""

    def convert(weight: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(weight, FP8Weight):
            return NotImplemented
        args = tuple(_or_its_own(asked, weight) for asked in args)
        kwargs = {name: _or_its_own(asked, weight) for name, asked in kwargs.items()}
        result = func(weight, *args, **kwargs)
        return _alias(weight) if result is weight and getattr(weight, "_is_param", False) else result

    implements(FUNCTIONS, func)(convert)


for _method in ("to", "type", "half", "bfloat16", "float", "double", "cpu", "cuda"):
    _converts(getattr(torch.Tensor, _method))


def _or_its_own(asked: Any, weight: FP8Weight) -> Any:
    """In an argument of ``Tensor.to``, the weight's own dtype in place of an FP8 dtype."""
    if isinstance(asked, torch.Tensor) and is_8_bits(asked.dtype):
        return torch.empty((), dtype=weight.dtype, device=asked.device)
    return weight.dtype if is_8_bits(asked) else asked


def _alias(weight: FP8Weight) -> FP8Weight:
    """Another wrapper of the same parameter: nn.Module cannot swap a parameter with itself if it has weak
    references."""
    twin = weight.like()
    twin.__dict__.update(weight.__dict__)
    return twin.fresh()


def _cast_home(home: Home, dtype: torch.dtype) -> Home:
    if home.stored is None:  # never quantized
        twin = home.copy()
        assert home.dense is not None
        twin.dense = home.dense.to(dtype, copy=True)
        twin.owned = home.owned
        return _with_original(home, twin, dtype, None)
    stored = home.settle()
    assert stored is not None
    if stored.packed is not None and dtype not in stored.packed.dtypes:
        stored = Stored(stored.scaled())  # another engine may be chosen for the new dtype
    return _with_original(home, home.copy(stored), dtype, None)


def _moved_home(home: Home, dtype: torch.dtype, device: torch.device) -> Home:
    if home.stored is None or (home.settle() is None):
        twin = home.copy()
        assert home.dense is not None
        twin.stored, twin.dense = None, home.dense.to(device, dtype)
    else:
        weight = home.scaled()
        data = weight.data.view(torch.uint8).to(device).view(weight.data.dtype)
        twin = home.copy(Stored(ScaledTensor(data, weight.scale.to(device), weight.granularity)))
    if home.input_scale is not None:
        twin.input_scale = home.input_scale.to(device)
    if device.type == "meta":
        twin.activity = home.activity  # accelerate puts this in place of a weight that will come back
    return _with_original(home, twin, dtype, device)


def _with_original(home: Home, twin: Home, dtype: torch.dtype, device: torch.device | None) -> Home:
    """Copies the kept original as well, cast and moved; ``cpu_offload`` leaves it on its device."""
    original = home.original
    if original is None or home.follows:
        return twin
    where = original.device if device is None or home.options.fp16_weight_storage == "cpu_offload" else device
    values = original.detach().to(where, dtype, copy=True).contiguous()
    kept = torch.nn.Parameter(values, original.requires_grad)
    twin.hold_original(kept, behind=home.changed)
    if (
        twin.stored is None
        and twin.dense is not None
        and twin.dense.shape == values.shape
        and where == twin.dense.device
    ):
        twin.dense = kept.detach()
    return twin


def part_taken(
    weight: FP8Weight, *, to_write: bool = False, grid: Granularity | None = None
) -> tuple[ScaledTensor, Part] | None:
    stored, part = weight._home.settle(), weight.part()
    if stored is None or part is None:
        return None
    scaled = stored.scaled() if grid is None else refined(stored.scaled(), grid)
    taken = part.take(scaled, to_write=to_write)
    return None if taken is None else (taken, part)


def own(weight: FP8Weight, scaled: ScaledTensor, part: Part, dtype: torch.dtype) -> FP8Weight:
    """A separate weight with these bytes, in the orientation of the view they come from."""
    layout = Layout(tuple(scaled.shape), turned=part.flipped)
    if tuple(weight.size()) == weight._home.layout.folded:
        layout = weight._home.layout
    return FP8Weight(weight._home.copy(Stored(scaled), layout), dtype)


def with_smaller_blocks(weight: FP8Weight) -> FP8Weight:
    """A copy of a view that was given smaller blocks; other weights themselves."""
    grid = weight.__dict__.get(BLOCKS_OF_COPIES)
    if grid is None or (found := part_taken(weight, grid=grid)) is None:
        return weight
    separate = own(weight, found[0].clone(), found[1], weight.dtype)
    separate._home.scheme = part_scheme(weight._home.scheme, grid)
    return separate


@implements(OPERATIONS, aten.clone.default)
def _clone(weight: FP8Weight, *, memory_format: Any = None) -> Any:
    if BLOCKS_OF_COPIES in weight.__dict__:
        return with_smaller_blocks(weight)
    home = weight._home
    if home.stored is not None and weight.is_whole() and home.settle() is not None:
        return weight.like(home=_with_original(home, home.copy(), weight.dtype, None))
    taken = None if home.stored is None or COPIES_ARE_DENSE in weight.__dict__ else part_taken(weight)
    if taken is None:
        return NotImplemented
    scaled, part = taken
    separate = own(weight, scaled.clone(), part, weight.dtype)
    if home.original is not None and not home.follows:  # so that a write to the copy is as exact as one to the weight
        values = home.original.detach()
        values = part.cut(home.layout.plain(values))
        values = (values.transpose(-1, -2) if part.flipped else values).contiguous().clone()
        separate._home.hold_original(torch.nn.Parameter(values, home.original.requires_grad))
        separate._home.precision = home.precision
    return separate


@implements(OPERATIONS, aten.copy_.default)
def _copy(target: Any, source: Any, non_blocking: bool = False) -> Any:
    """Copies bytes between weights of the same granularity, and values into plain tensors."""
    if not isinstance(target, FP8Weight):
        target.copy_(read_of(source))
        return target
    if isinstance(source, FP8Weight) and source._home is target._home and _same_view(source, target):
        return target
    if target.numel() == 0 and source.numel() == 0:
        return target
    if not isinstance(source, FP8Weight) or source.shape != target.shape or source._home is target._home:
        return NotImplemented
    a, b = target._home, source._home
    grid = a.scheme.weight
    grids_differ = grid != b.scheme.weight and (not isinstance(a.scheme, Sharded) or a.scheme.whole != b.scheme)
    if (
        grids_differ
        or a.options.weight_dtype != b.options.weight_dtype
        or a.stored is None
        or b.stored is None
        or a.original is not None
        or b.precision == "original"
    ):
        return NotImplemented
    if b.settle() is None or a.dense is not None:
        return NotImplemented  # pending writes: copy their values, so that each is rounded only once
    if torch.compiler.is_compiling() or watched_by_a_mode():
        return _copy_in_place(target, source)
    there, here = part_taken(source, grid=grid), part_taken(target, to_write=True)
    if there is None or here is None or there[1].flipped != here[1].flipped:
        return NotImplemented
    write_part(target, there[0])
    count_write(target)
    return target


def _same_view(a: FP8Weight, b: FP8Weight) -> bool:
    return a.size() == b.size() and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()


def watched_by_a_mode() -> bool:
    return bool(torch._C._len_torch_dispatch_stack())


def _copy_in_place(target: FP8Weight, source: FP8Weight) -> Any:
    """For traced graphs, which end by copying into the tensors they were given."""
    a, b = target._home.settle(), source._home.settle()
    if not (target.is_whole() and source.is_whole()) or a is None or b is None:
        return NotImplemented
    ours, theirs = (stored.packed if stored.plain is None else stored.plain for stored in (a, b))
    if ours is None or theirs is None or ours.data.shape != theirs.data.shape or type(ours) is not type(theirs):
        return NotImplemented
    ours.data.copy_(theirs.data)
    ours.scale.copy_(theirs.scale)
    for stored in (a, b):
        stored.forms = {}
    target._home.touch()
    return target


def write_part(target: FP8Weight, scaled: ScaledTensor) -> None:
    """Overwrites the bytes and scales of a block-aligned part; readers see the weight before or after."""
    home, part = target._home, target.part()
    with lock():  # other threads may write to other parts
        stored = home.settle()
        assert stored is not None
        assert part is not None
        new = stored.scaled().clone()
        taken = part.take(new, to_write=True)
        assert taken is not None
        taken.data.view(torch.uint8).copy_(scaled.data.view(torch.uint8))
        taken.scale.copy_(scaled.scale)
        home.search = None if home.search is None else home.search.written()
        home.take_bytes(new)
