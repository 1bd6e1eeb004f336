"""A model of which each layer can be in FP8, by any of several schemes, or as it was; and its outputs then."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import UnsupportedError
from ..models.batches import Batch, evaluating
from ..models.filters import ModuleFilter
from ..models.interrupts import Interrupts
from ..models.moments import searches
from ..models.recipe import ORIGINAL, Recipe, Treatment
from ..models.selection import Conversion, complain, planned
from ..scaled import FP8GemmOptions
from ..weights import Change, FP8Weight, leave
from ..weights.convert import scheme_for
from ..weights.search import Search
from ..weights.sharding import is_distributed
from ..weights.shares import is_split
from .metrics import Metric, main_output
from .probes import duplicate

Assignment = Mapping[str, Treatment]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What may become of one layer: its treatments in the order of preference, with the bytes that each takes."""

    step: Conversion
    sizes: Mapping[Treatment, int]

    @property
    def name(self) -> str:
        return self.step.name


def choices_of(
    model: nn.Module, options: FP8GemmOptions, module_filter: ModuleFilter | None, candidates: Sequence[Treatment]
) -> tuple[list[Choices], dict[str, str]]:
    """The layers that can be converted, and why others cannot or are not to be.

    Raises:
        ValueError: the model is patched or on meta, or there is nothing to convert.
        UnsupportedError: weights are split among processes.
    """
    _refuse(model)
    sizes: dict[str, dict[Treatment, int]] = {}
    first: dict[str, Conversion] = {}
    kept: dict[str, str] = {}
    for candidate in candidates:
        if candidate == ORIGINAL:
            continue
        given = Recipe(options=replace(options, scheme=candidate))
        steps, wanted = planned(model, given, module_filter, {})
        if not first:
            complain(wanted, steps, model, given)
        for step in steps:
            if step.converts:
                first.setdefault(step.name, step)
                sizes.setdefault(step.name, {})[candidate] = _size(step, given.options)
            else:
                kept.setdefault(step.name, step.reason)
    if ORIGINAL in candidates:
        for name, step in first.items():
            sizes[name][ORIGINAL] = step.tensor.nbytes
    choices = [Choices(step=step, sizes=sizes[name]) for name, step in first.items()]
    return choices, {name: reason for name, reason in kept.items() if name not in first}


def _refuse(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_split(parameter) or is_distributed(parameter):
            raise UnsupportedError(f"{name} is split among processes: tune the model before it is split")
        if isinstance(parameter, FP8Weight):
            lost = parameter._home.original is None
            raise ValueError(
                f"{name} is on FP8 already"
                + (
                    ", and its original was discarded: load the model again"
                    if lost
                    else ": call disable_fp8_gemm(model)"
                )
                + " and tune it before it is patched"
            )
        if parameter.is_meta:
            raise ValueError(f"{name} is on meta: load the model's weights before it is tuned")


def _size(step: Conversion, options: FP8GemmOptions) -> int:
    """The bytes of FP8 data and float32 scales."""
    shape = step.layout.shape
    return scheme_for(step.effective(options), step.parameter, shape).nbytes(shape)


class Variants:
    """The variants of a model, in place: a layer's original stays in memory while its FP8 weight stands in for it.

    ``restore`` makes the model what it was, bit for bit. Each run has the same random numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        choices: Sequence[Choices],
        data: Sequence[Batch],
        metric: Metric,
        options: FP8GemmOptions,
        interrupts: Interrupts,
    ) -> None:
        self.model, self.data, self.metric, self.interrupts = model, data, metric, interrupts
        self.choices = {one.name: one for one in choices}
        self.given = options
        # Originals are held here; one that is kept in a weight would count writes, and perhaps run instead of it.
        self.options = replace(options, fp16_weight_storage="discard", materialize_fp8_on_wrap=True)
        self.searches: dict[tuple[str, Treatment], Search | None] = {}
        self.changes: dict[str, tuple[Treatment, Change]] = {}
        self.originals: list[Any] = []
        self.runs = 0

    def prepare(self) -> None:
        """Finds the scales and codes that the options search for, for every scheme, with the original's inputs."""
        for treatment in dict.fromkeys(treatment for one in self.choices.values() for treatment in one.sizes):
            if treatment == ORIGINAL or self.options.weight_search == "none":
                continue
            steps = [replace(one.step, scheme=treatment) for one in self.choices.values() if treatment in one.sizes]
            found = searches(self.model, steps, self.options, list(self.data))
            self.searches.update({(step.name, treatment): found.get(id(step.tensor)) for step in steps})
            self.interrupts.deliver()

    def observe_original(self) -> float:
        """Runs the original, whose outputs all others are compared with; returns the metric of no difference.

        Raises:
            ValueError: an output of the original is not finite, or the metric gives no number.
        """
        self.originals = []
        for number, batch in enumerate(self.data, start=1):
            output = self._run(batch)
            tensor = main_output(output)
            if bool(tensor.isnan().any()) or bool(tensor.isposinf().any()):
                raise ValueError(
                    f"the original model itself gives outputs that are not finite, on batch {number} of "
                    f"{len(self.data)}: nothing can be compared with them"
                )
            self.originals.append(self.metric.keep(output))
        self.runs += 1
        return self.metric.measure((y, y) for y in self.originals)

    def value(self, wanted: Assignment) -> tuple[float, bool]:
        """The metric of a variant, and whether its outputs are finite; if not, it is the worst there is."""
        self.become(wanted)
        self.runs += 1
        finite = True

        def pairs() -> Any:
            nonlocal finite
            for batch, y in zip(self.data, self.originals, strict=True):
                output = self._run(batch)
                tensor = main_output(output)
                if bool(tensor.isnan().any()) or bool(tensor.isposinf().any()):
                    finite = False
                yield y, self.metric.keep(output)

        value = self.metric.measure(pairs())
        return (self.metric.worst if math.isnan(value) or not finite else value), finite

    def become(self, wanted: Assignment) -> None:
        for name, choices in self.choices.items():
            former = self.changes[name][0] if name in self.changes else ORIGINAL
            treatment = wanted.get(name, ORIGINAL)
            if treatment != former:
                self._undo(name)
            if treatment not in (former, ORIGINAL):
                self._convert(choices.step, treatment)
            self.interrupts.deliver()

    def _convert(self, step: Conversion, treatment: Any) -> None:
        original: Any = step.module._parameters[step.parameter]
        search = self.searches.get((step.name, treatment))
        parameter = replace(step, scheme=treatment).make(self.options, search)
        change = Change(*((place.module, place.parameter, place.kind) for place in step.places))
        self.changes[step.name] = treatment, change
        change.put(parameter)
        change.former = original  # which the change has dropped, as if it were to be freed

    def _undo(self, name: str) -> None:
        if name not in self.changes:
            return
        self.changes[name][1].undo()
        del self.changes[name]
        for place in self.choices[name].step.places:
            leave(place.module)  # the change undoes less where the module had another FP8 weight when it was made

    def restore(self) -> None:
        for name in list(self.changes):
            self._undo(name)

    def first_not_finite(self, wanted: Assignment) -> str | None:
        """The first converted layer whose output is not finite, though its inputs are; None if there is none."""
        self.become(wanted)
        self.runs += 1
        found: list[str] = []
        modules = {choices.step.module: name for name, choices in self.choices.items() if name in self.changes}

        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not found and _finite((args, kwargs)) and not _finite(output):
                found.append(modules[module])

        hooks = [module.register_forward_hook(look, with_kwargs=True) for module in modules]
        try:
            for batch in self.data:
                self._run(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else None

    def _run(self, batch: Batch) -> Any:
        # A compiled graph would be compiled again for each variant.
        with evaluating(self.model), torch.compiler.set_stance("force_eager"):
            try:
                self.interrupts.open = True
                return Batch(duplicate(batch.args), duplicate(batch.kwargs)).run(self.model)
            finally:
                self.interrupts.open = False


def _finite(values: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return all(not bool(tensor.isnan().any()) and not bool(tensor.isposinf().any()) for tensor in tensors)
