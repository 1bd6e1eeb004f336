"""Running a patched model on dense weights for a while."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import UnsupportedError
from ..weights import FP8Weight
from ..weights.passes import unnoted
from ..weights.sharding import held, is_distributed

Model = TypeVar("Model", bound=nn.Module)

_paused: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the owners of weights that are dense at the moment


@dataclass(frozen=True)
class _Place:
    """A parameter of a module: its FP8 weight, and the dense one that stands in for it."""

    module: nn.Module
    name: str
    weight: FP8Weight
    dense: nn.Parameter


@contextmanager
def paused(model: Model) -> Iterator[Model]:
    """Runs ``model`` on dense weights while the block lasts: on the originals where they are kept, else on the values
    that the FP8 weights stand for, in their dtype.

    Layers stay the same objects, and get the same FP8 parameters back afterwards, however the block ends. What the
    block writes to a weight, or assigns, is quantized then. The dense values are in memory at the same time as the FP8
    bytes. Other threads that run the model meanwhile run it on either.

    Raises:
        ValueError: the model has no FP8 weights.
        UnsupportedError: a weight is split among processes.

    Example:
        >>> from fp8gemm import FP8GemmOptions, enable_fp8_gemm
        >>> layer = nn.Linear(64, 32)
        >>> x = torch.randn(3, 64)
        >>> dense = layer(x)
        >>> model = enable_fp8_gemm(layer, options=FP8GemmOptions(fp16_weight_storage="keep"))
        >>> with paused(model):
        ...     print(model(x).equal(dense))
        True
        >>> model(x).equal(dense)
        False
    """
    places = _places(model)
    if not places and not any(module in _paused for module in model.modules()):
        raise ValueError("the model has no FP8 weights to pause: call enable_fp8_gemm(model) first")
    versions = {id(place.dense): place.dense._version for place in places}
    try:
        for place in places:
            place.module._parameters[place.name] = place.dense
            _paused.add(place.module)
        with unnoted(model):
            yield model
    finally:
        written = [place for place in places if place.dense._version != versions[id(place.dense)]]
        for place in places:
            _put_back(place)
        for place in {id(place.weight._home): place for place in written}.values():
            if place.weight._home.original is None:  # else the writes have gone to the original itself
                with torch.no_grad():
                    place.weight.copy_(place.dense)


def _places(model: nn.Module) -> list[_Place]:
    found, dense = [], {}
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if not isinstance(held(weight), FP8Weight):
                continue
            if not isinstance(weight, FP8Weight) or is_distributed(weight):
                full = f"{path}.{name}".strip(".")
                raise UnsupportedError(f"{full} is split among processes: pause the model before it is split")
            home = weight._home
            if id(home) not in dense:  # tied weights stay tied
                dense[id(home)] = _dense(weight)
            found.append(_Place(module, name, weight, dense[id(home)]))
    return found


def _dense(weight: FP8Weight) -> nn.Parameter:
    home, before = weight._home, weight._home.activity.dequantizations
    values = weight.dequantize() if home.original is None else home.values(weight.dtype)
    home.activity.dequantizations = before  # no product asked for them
    return nn.Parameter(values, requires_grad=False)


def _put_back(place: _Place) -> None:
    parameters: dict[str, Any] = place.module._parameters
    assigned = parameters.get(place.name)
    if place.name in parameters:
        parameters[place.name] = place.weight
        if assigned is not place.dense and assigned is not None:
            setattr(place.module, place.name, assigned)  # in the block
    _paused.discard(place.module)
