"""All other operations: they run on dense values, and what they write reaches the weight through any of its views."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from ..errors import UnsupportedError
from .copies import count_write
from .dispatch import FUNCTIONS, OPERATIONS, implements
from .stored import lock
from .values import read_of, window
from .weight import FP8Weight

aten = torch.ops.aten


@implements(OPERATIONS, None)
def _other(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func.namespace != "aten" and (handler := OPERATIONS.get(func.name())) is not None:
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    # nested tensors have kernels of their own
    if not any(isinstance(one, torch.Tensor) and one.is_nested for one in args):
        whole = func.decompose(*args, **kwargs)  # operations that inference mode does not decompose, such as to()
        if whole is not NotImplemented:
            return whole
    arguments = func._schema.arguments
    first = arguments[0].alias_info if arguments else None
    if first is not None and args and isinstance(args[0], FP8Weight):
        if not first.is_write:
            return _view(func, args[0], args[1:], kwargs)
        if torch.Tag.inplace_view in func.tags:
            raise _refusal(func._schema.name.removeprefix("aten::"), "and keeps its shape, ")
    return _on_values(func, args, kwargs)


@implements(OPERATIONS, aten.detach_.default, aten.resize_.default, aten.resize_as_.default)
def _same_shape(weight: Any, shape: Any = None, **others: Any) -> Any:
    """A no-op: torch resizes outputs that already have the right shape."""
    wanted = shape.size() if isinstance(shape, torch.Tensor) else shape
    unchanged = isinstance(weight, FP8Weight) and (wanted is None or tuple(wanted) == tuple(weight.size()))
    return weight if unchanged else NotImplemented


@implements(OPERATIONS, aten._unsafe_view.default)
def _unsafe_view(weight: FP8Weight, size: Any) -> Any:
    """A view although its schema does not say so: torch's own operations write through it."""
    return _view(aten.view.default, weight, (size,), {})


def _view(func: Any, weight: FP8Weight, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a view operation on the geometry only; the result shares the home."""
    found = weight.geometry_of(func, *args, **kwargs)
    return tree_map_only(torch.Tensor, lambda t: weight.like((tuple(t.size()), t.stride(), t.storage_offset())), found)


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operation on dense values. Writes go to ``Home.master``, which is quantized once, later."""
    written = _written(func, args, kwargs)
    if written:
        with lock():  # so that no other thread quantizes half-written values
            return _writing(func, args, kwargs, written)
    read = _blank if func in _BY_SHAPE else read_of
    made: dict[int, torch.Tensor] = {}

    def values(weight: FP8Weight) -> torch.Tensor:
        if id(weight) not in made:
            made[id(weight)] = read(weight)
        return made[id(weight)]

    return func(*tree_map_only(FP8Weight, values, args), **tree_map_only(FP8Weight, values, kwargs))


# Operations that use only the shape, dtype and device of these tensors.
_BY_SHAPE = {
    getattr(packet, overload)
    for packet in (
        *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.rand_like, aten.randn_like),
        *(aten.randint_like, aten.new_empty, aten.new_empty_strided, aten.new_full, aten.new_zeros, aten.new_ones),
    )
    for overload in packet.overloads()  # type: ignore[no-untyped-call]
    if not overload.endswith("out")
}


def _blank(weight: FP8Weight) -> torch.Tensor:
    return torch.empty_strided(weight.size(), weight.stride(), dtype=weight.dtype, device=weight.device)


def _writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[FP8Weight]) -> Any:
    masters = {id(weight._home): weight._home for weight in written}
    outs = {id(weight) for weight in _written(func, (), kwargs)}
    made: dict[int, tuple[FP8Weight, torch.Tensor]] = {}

    def values(weight: FP8Weight) -> torch.Tensor:
        if id(weight) not in made:
            if id(weight._home) in masters:
                w = _master(weight)
                w = w.clone() if id(weight) in outs else w  # torch may resize an ``out``
            else:
                w = read_of(weight)
            made[id(weight)] = (weight, w)
        return made[id(weight)][1]

    try:
        result = func(*tree_map_only(FP8Weight, values, args), **tree_map_only(FP8Weight, values, kwargs))
        for weight, w in [made[one] for one in outs]:
            if w.size() != weight.size():
                raise _refusal(f"out= of shape {list(w.size())}", f"and keeps its shape {list(weight.size())}, ")
            _master(weight).copy_(w)
    finally:
        for home in masters.values():
            home.touch()
        for weight in written:
            count_write(weight)
    back = {id(made[id(weight)][1]): weight for weight in written if id(weight) in made}
    return tree_map_only(torch.Tensor, lambda t: back.get(id(t), t), result)


def _master(weight: FP8Weight) -> torch.Tensor:
    """The dense values that are written to in place of a weight or a view of it."""
    dense = weight._home.master(weight.dtype)
    return window(dense, weight.size(), weight.stride(), weight.offset)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[FP8Weight]:
    """The weights that an operation writes to, according to its schema."""
    found: list[FP8Weight] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_flatten(value)[0] if isinstance(t, FP8Weight)]
    return found


def _refusal(what: str, why: str = "") -> UnsupportedError:
    return UnsupportedError(
        f"an FP8 weight has no memory of its own dtype, {why}so {what} is impossible; weight.dequantize() is a dense "
        "tensor, and weight.copy_(values) writes one back"
    )


@implements(OPERATIONS, aten.view.dtype)
def _view_as_bits(weight: FP8Weight, dtype: torch.dtype) -> FP8Weight:
    if dtype != weight.dtype:
        raise _refusal(f"view({dtype})")
    return weight.like()


@implements(FUNCTIONS, torch.Tensor.numpy, torch.Tensor.__array__)
def _as_array(weight: FP8Weight, *args: Any, **kwargs: Any) -> Any:
    """A read-only array: writes to it would not reach the weight."""
    array = read_of(weight).__array__(*[a for a in args if a is not None])  # type: ignore[no-untyped-call]
    array.flags.writeable = False
    return array


@implements(FUNCTIONS, torch.Tensor.tolist)
def _as_list(weight: FP8Weight) -> Any:
    return read_of(weight).tolist()


@implements(FUNCTIONS, torch.Tensor.__dlpack__)
def _exported(weight: Any, *args: Any, **kwargs: Any) -> Any:
    raise _refusal("sharing it through DLPack")


@implements(FUNCTIONS, torch.Tensor.apply_, torch.Tensor.map_, torch.Tensor.map2_)
def _by_element(weight: Any, *args: Any, **kwargs: Any) -> Any:
    raise _refusal("apply_, map_ or map2_")


@implements(FUNCTIONS, torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _ask_for_gradient(weight: FP8Weight, requires_grad: bool = True) -> Any:
    if not requires_grad:
        return NotImplemented
    raise UnsupportedError(
        f"an FP8 weight of shape {tuple(weight.shape)} takes no gradient: train adapters beside it (LoRA), keep the "
        "layer dense by module_filter, or disable_fp8_gemm(model) first"
    )
