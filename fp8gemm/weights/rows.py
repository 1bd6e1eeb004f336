"""One row of the report for each weight: what became of it, its memory, and what has run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..scaled import Precision
from .activity import Activity, Counts
from .convert import CONVERTED
from .linear import FP8Linear
from .passes import passes_of
from .sharding import held
from .structure import ITSELF, STACK_NAMES, layer_name, stacks
from .weight import FP8Weight

KEPT = "_fp8gemm_kept"  # attribute of a module: why each of its dense parameters was kept, by name
_REPLACED = "its weight was replaced by a dense one after patching"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One weight: ``status`` is ``"fp8"`` or ``"kept"`` (with the ``reason``); bytes are those of the weight.

    ``bytes_after`` counts FP8 data, scales and a kept original. ``calls``, ``kernels`` and ``dequantizations`` count
    from patching on, in compiled graphs too, with the exceptions in docs/limits.md. ``ties`` lists other names of the
    same weight, for example the embedding of a tied output head. ``share`` is the weight's share, from 0 to 1, of all
    multiply-adds with parameters in the first forward pass after patching; None before that pass. ``precision`` is
    what ``set_precision`` has said last: ``"fp8"``, ``"weight_only"`` or ``"original"``. ``search`` says how
    ``FP8GemmOptions.weight_search`` found its scales and codes. ``saturated`` of ``checked`` activations were beyond
    its static range in ``count_saturation``.

    ``last`` counts the products and dequantizations of the last forward pass that has returned and was not compiled;
    None before that pass. ``replaced`` is whether a converted weight was replaced by a dense one, and ``overridden``
    whether the layer's ``forward`` was replaced, so that products may not use the weight.
    """

    name: str
    status: str
    shape: tuple[int, ...]
    reason: str = ""
    engine: str = ""
    scheme: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    calls: int = 0
    kernels: tuple[tuple[str, int], ...] = ()
    dequantizations: int = 0
    ties: tuple[str, ...] = ()
    share: float | None = None
    precision: Precision = "fp8"
    search: str = ""
    saturated: int = 0
    checked: int = 0
    last: Counts | None = None
    replaced: bool = False
    overridden: bool = False


def rows(model: nn.Module) -> Iterator[Row]:
    """The rows of every FP8 weight of ``model``, and of each matrix that was kept dense."""
    modules = list(model.named_modules())
    patched = any(_weights(one) or KEPT in one.__dict__ or isinstance(one, FP8Linear) for _, one in modules)
    places = _places(modules)
    for name, module in modules:
        for _, weight in _weights(module):
            if (found := places.pop(id(weight._home), None)) is not None:
                yield _converted_row(found, weight, _last(model, weight._home.activity))
        reasons = module.__dict__.get(KEPT, {})
        for parameter, reason in reasons.items():
            if not isinstance(held(module._parameters.get(parameter)), FP8Weight):
                yield _kept_row(layer_name(name, parameter), module, parameter, reason)
        if patched:
            yield from _later_rows(name, module, reasons)


def activities(model: nn.Module) -> dict[str, Activity]:
    """The counters of every FP8 weight, by the name in its row."""
    modules = list(model.named_modules())
    weights = {id(weight._home): weight._home.activity for _, module in modules for _, weight in _weights(module)}
    return {places[0][0] or ITSELF: weights[home] for home, places in _places(modules).items()}


def _places(modules: Collection[tuple[str, nn.Module]]) -> dict[int, list[tuple[str, nn.Module]]]:
    """The layers that hold each FP8 weight, by its home, so that a tied weight has one row."""
    places: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in modules:
        for parameter, weight in _weights(module):
            places.setdefault(id(weight._home), []).append((layer_name(name, parameter), module))
    for found in places.values():
        found.sort(key=lambda place: not isinstance(place[1], nn.Linear))  # an output head before its embedding
    return places


def _last(model: nn.Module, activity: Activity) -> Counts | None:
    """What a weight did in the last forward pass; if the model is a single layer, since it was patched."""
    if isinstance(model, FP8Linear):
        return activity.counts() if activity.calls or activity.dequantizations else None
    passes = passes_of(model)
    return None if passes is None or passes.last is None else activity.between(*passes.last)


def _weights(module: nn.Module) -> list[tuple[str, FP8Weight]]:
    """A module's own FP8 weights; for distributed ones, the local shard."""
    parts = [(name, held(parameter)) for name, parameter in module._parameters.items()]
    return [(name, part) for name, part in parts if isinstance(part, FP8Weight)]


def _later_rows(name: str, module: nn.Module, known: Collection[str]) -> Iterator[Row]:
    """Dense Linears and stacks of experts that were added to the model after patching, or took the place of FP8
    weights."""
    converted = module.__dict__.get(CONVERTED, frozenset())
    matrices = ["weight"] if isinstance(module, nn.Linear) else []
    matrices += [stack for stack in stacks(module) if stack in STACK_NAMES]
    for parameter in dict.fromkeys((*matrices, *sorted(converted))):
        own = held(module._parameters.get(parameter))
        if own is None or parameter in known or isinstance(own, FP8Weight):
            continue
        replaced = parameter in converted or isinstance(module, FP8Linear)
        reason = _REPLACED if replaced else "added after patching"
        yield _kept_row(layer_name(name, parameter), module, parameter, reason, replaced=replaced)


def _converted_row(places: list[tuple[str, nn.Module]], weight: FP8Weight, last: Counts | None) -> Row:
    home, activity = weight._home, weight._home.activity
    return Row(
        name=places[0][0] or ITSELF,
        ties=tuple(name for name, _ in places[1:]),
        status="fp8",
        shape=tuple(home.layout.shape),
        engine=home.engine or "",
        scheme=str(home.scheme),
        bytes_before=weight.numel() * weight.dtype.itemsize,
        bytes_after=home.nbytes,
        calls=activity.calls,
        kernels=tuple(Counter(activity.kernels).most_common()),
        dequantizations=activity.dequantizations,
        precision=home.precision,
        search="" if home.search is None else home.search.text,
        saturated=activity.saturated,
        checked=activity.checked,
        last=last,
        overridden=any("forward" in module.__dict__ for _, module in places),
    )


def _kept_row(name: str, module: nn.Module, parameter: str, reason: str, **facts: Any) -> Row:
    matrix = module._parameters.get(parameter)
    if matrix is None or isinstance(matrix, nn.UninitializedParameter):
        matrix = getattr(module, parameter, None)  # computed at each access, as by weight_norm
    known = isinstance(matrix, torch.Tensor) and not isinstance(matrix, nn.UninitializedParameter)
    size = matrix.nbytes if matrix is not None and known else 0
    return Row(
        name=name or ITSELF,
        status="kept",
        shape=tuple(matrix.shape) if matrix is not None and known else (),
        reason=reason,
        bytes_before=size,
        bytes_after=size,
        **facts,
    )
