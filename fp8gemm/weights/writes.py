"""All other operations: on dense values, and what they write lands in the weight, whichever view was written to."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from ..errors import UnsupportedError
from .dispatch import OPERATIONS, implements
from .home import Home
from .weight import FP8Weight

aten = torch.ops.aten


@implements(OPERATIONS, None)
def _other(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    arguments = func._schema.arguments
    first = arguments[0].alias_info if arguments else None
    if first is not None and not first.is_write and args and isinstance(args[0], FP8Weight):
        return _view(func, args[0], args[1:], kwargs)
    return _on_values(func, args, kwargs)


def _view(func: Any, weight: FP8Weight, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A view operation is geometry: its result shares the home."""
    found = weight.geometry_of(func, *args, **kwargs)
    return tree_map_only(torch.Tensor, lambda t: weight.like((tuple(t.size()), t.stride(), t.storage_offset())), found)


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operation on dense values. It writes to the home's master, which is rounded to FP8 once, later."""
    written = _written(func, args, kwargs)
    masters: dict[int, tuple[Home, torch.Tensor]] = {}
    for weight in written:
        if id(weight._home) not in masters:
            masters[id(weight._home)] = (weight._home, weight._home.master(weight.dtype))
    made: dict[int, tuple[FP8Weight, torch.Tensor]] = {}

    def values(weight: FP8Weight) -> torch.Tensor:
        if id(weight) not in made:
            master = masters.get(id(weight._home))
            if master is None:
                w = weight.dequantize()
            else:
                w = master[1].as_strided(weight.size(), weight.stride(), weight.storage_offset())
                w = w if w.dtype == weight.dtype else w.to(weight.dtype)
            made[id(weight)] = (weight, w)
        return made[id(weight)][1]

    try:
        result = func(*tree_map_only(FP8Weight, values, args), **tree_map_only(FP8Weight, values, kwargs))
    finally:
        for home, _ in masters.values():
            home.touch()
    back = {id(made[id(weight)][1]): weight for weight in written if id(weight) in made}
    return tree_map_only(torch.Tensor, lambda t: back.get(id(t), t), result)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[FP8Weight]:
    """The weights that an operation writes to, by its schema."""
    found: list[FP8Weight] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_flatten(value)[0] if isinstance(t, FP8Weight)]
    return found


@implements(
    OPERATIONS,
    aten.view.dtype,
    aten.resize_.default,
    aten.set_.source_Tensor,
    aten.set_.source_Storage,
    aten.set_.source_Storage_storage_offset,
    aten.set_.default,
)
def _refused(weight: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(weight, FP8Weight):
        return NotImplemented
    raise UnsupportedError(
        "an FP8 weight has no memory of its own dtype, so set_, resize_ and view(dtype) are not possible; "
        "weight.dequantize() is a dense tensor"
    )
