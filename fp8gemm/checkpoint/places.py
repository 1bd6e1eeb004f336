"""Where a model keeps its tensors: by name, with those that are one tensor under several names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Place:
    """One name of one parameter or buffer: ``module`` keeps it as ``attribute``."""

    name: str
    module: nn.Module
    attribute: str
    tensor: torch.Tensor

    @property
    def is_parameter(self) -> bool:
        return self.attribute in self.module._parameters

    @property
    def is_linear_weight(self) -> bool:
        return isinstance(self.module, nn.Linear) and self.attribute == "weight"

    def put(self, tensor: torch.Tensor) -> None:
        """Makes ``tensor`` what the module keeps here, as it was kept: a Parameter stays one."""
        if self.is_parameter:
            self.module._parameters[self.attribute] = tensor  # type: ignore[assignment]
        else:
            self.module._buffers[self.attribute] = tensor


def places(model: nn.Module) -> dict[str, Place]:
    """Every name that ``model.state_dict()`` has for a parameter or a buffer."""
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in _own_tensors(module):
            if attribute not in module._non_persistent_buffers_set:
                name = f"{prefix}.{attribute}" if prefix else attribute
                found[name] = Place(name=name, module=module, attribute=attribute, tensor=tensor)
    return found


def transient(model: nn.Module) -> dict[str, Place]:
    """The buffers that are never saved, by name."""
    found = {}
    for prefix, module in model.named_modules():
        for attribute, tensor in _own_tensors(module):
            if attribute in module._non_persistent_buffers_set:
                name = f"{prefix}.{attribute}" if prefix else attribute
                found[name] = Place(name=name, module=module, attribute=attribute, tensor=tensor)
    return found


def groups(found: Iterable[Place]) -> list[list[Place]]:
    """The places that are one and the same tensor, together."""
    by_tensor: dict[int, list[Place]] = {}
    for place in found:
        by_tensor.setdefault(id(place.tensor), []).append(place)
    return list(by_tensor.values())


def initialise_transient(model: nn.Module, device: torch.device) -> list[str]:
    """Computes the never saved buffers that are on meta, as transformers models can; returns the names of the rest.

    A buffer counts as computed when what it held before does not matter: it comes out the same from two fills.
    """
    waiting = [place for place in transient(model).values() if place.tensor.is_meta]
    initialise = getattr(model, "_init_weights", None)
    if not waiting or not callable(initialise):
        return [place.name for place in waiting]
    owners = {id(place.module): place.module for place in waiting}
    results: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for fill in (0, 1):
            for place in waiting:
                place.put(torch.full(place.tensor.shape, fill, dtype=place.tensor.dtype, device=device))
            for module in owners.values():
                initialise(module)
            results.append([place.module._buffers[place.attribute].clone() for place in waiting])  # type: ignore[union-attr]
    left = [place for place, first, second in zip(waiting, *results, strict=True) if not _same(first, second)]
    for place in left:
        place.put(place.tensor)
    return [place.name for place in left]


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.numel() == 0 or torch.equal(first.nan_to_num(), second.nan_to_num())


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield attribute, parameter
    for attribute, buffer in module._buffers.items():
        if buffer is not None:
            yield attribute, buffer
