"""Choosing, for each layer, a scheme or the original, so that the model's outputs stay within a budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..models.batches import Batch, batches
from ..models.filters import ModuleFilter
from ..models.interrupts import Interrupts, undisturbed
from ..models.recipe import ORIGINAL, TREATMENTS, Recipe, Treatment
from ..progress import counting
from ..scaled import FP8GemmOptions
from ..weights.structure import ITSELF
from .measure import measure
from .metrics import Metric, MetricName, OutputMetric, metric_of
from .probes import duplicate
from .roles import Role, roles
from .search import Assignment, Layer, Search
from .tuning import Point, Tuning
from .variants import Choices, Variants, choices_of

# How bad FP8 with these options is for each layer, by its name.
Sensitivities = Callable[[nn.Module, list[Batch], FP8GemmOptions, Sequence[str]], Mapping[str, float]]
Sensitivity = Literal["layers", "outputs"]
CANDIDATES: tuple[Treatment, ...] = ("row", "block", "weight_only", "original")


def tune(
    model: nn.Module,
    calibration_inputs: object,
    *,
    budget: float,
    metric: MetricName | OutputMetric = "cosine",
    candidates: Sequence[Treatment] = CANDIDATES,
    options: FP8GemmOptions | None = None,
    module_filter: ModuleFilter | None = None,
    sensitivity: Sensitivity | Sensitivities = "layers",
) -> Tuning:
    """Finds which layers to give another scheme, or to keep, so that ``metric`` meets ``budget`` at the fewest bytes.

    The outputs of each variant of the model are compared with the original's on the same inputs. The search begins with
    the first candidate everywhere. If that does not meet the budget, layers are made more precise in the order of the
    noise that this removes for the bytes it takes, by ``measure``; the first variant that meets the budget is found by
    bisection. Then layers are taken back, several at a time, as long as the budget is met. Everything that is chosen
    has been run; the order only decides what is run.

    A search takes at most ``4 + C + L C + 2 log2(L C)`` runs over all inputs, for ``L`` layers and ``C`` candidates,
    plus two for each layer that overflows, and usually a few for each layer that needs another treatment. Finding out
    what to try first takes two runs more for each scheme, or ``L`` with ``sensitivity="outputs"``. Memory grows by the
    FP8 copy of the weights and one output of each batch. The model ends as it was, bit for bit, also after an error or
    Ctrl-C.

    Args:
        calibration_inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or an iterable
            of those, such as a list or a DataLoader.
        budget: what the metric may be at most; for ``"psnr"``, at least.
        metric: ``"cosine"``, the mean of 1 - cos over all rows of the output; ``"kl"``, the mean Kullback-Leibler
            divergence of the softmax of the rows, in nats; ``"psnr"`` in dB, relative to the range of the original's
            outputs; or a callable of the original's and the variant's output of one batch, whose results are averaged
            over batches: lower is better. The first three compare ``logits``, ``last_hidden_state`` or ``sample`` if
            the output has one, else its first floating-point tensor.
        candidates: what a layer may become, in the order of preference; ``"original"``, if given, comes last.
        options: for all converted layers, except for their scheme. A ``weight_search`` is made with the calibration
            inputs, so give them to ``enable_fp8_gemm`` with the recipe; one of ``"rounding"`` holds the weights of
            every scheme in memory.
        module_filter: the layers to convert, as in ``enable_fp8_gemm``; the recipe keeps the others.
        sensitivity: what decides which layers are tried first. ``"layers"``: the error that FP8 makes in a layer's own
            output, by ``measure``. ``"outputs"``: what ``metric`` is with that layer alone in FP8, which takes a run
            for each layer and scheme, and finds smaller models. Or a callable ``(model, batches, options, names)``
            that returns how bad FP8 with these options is for each of the named layers.

    Returns:
        The recipe and the other variants that were run: see ``Tuning``.

    Raises:
        ValueError: no variant meets the budget, and the message tells the best one; there are no inputs, nothing to
            convert, or no such metric or candidate; the metric gives no number; the original's outputs are not finite;
            a layer overflows with every candidate; or the model is patched already.
        UnsupportedError: the requested engine cannot run a layer, or weights are split among processes.

    Example:
        >>> from fp8gemm import enable_fp8_gemm
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8))
        >>> tuning = tune(model, torch.randn(16, 64), budget=0.01)
        >>> tuning.value <= 0.01, enable_fp8_gemm(model, options=tuning.recipe) is model
        (True, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune takes an nn.Module, found {type(model).__name__}")
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or math.isnan(budget):
        raise ValueError(f"budget must be a number, found {budget!r}")
    _check(candidates, sensitivity)
    options, judge, data = options or FP8GemmOptions(), metric_of(metric), batches(calibration_inputs)
    choices, kept = choices_of(model, options, module_filter, candidates)
    observed = _roles(model, data[0])

    def run(interrupts: Interrupts) -> Tuning:
        variants = Variants(model, choices, data, judge, options, interrupts)
        try:
            session = _Session(variants, judge, budget, candidates, kept, observed)
            return session.tune(sensitivity)
        finally:
            variants.restore()

    return undisturbed(run)


def _roles(model: nn.Module, batch: Batch) -> dict[str, Role]:
    shown = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((batch.args, batch.kwargs)))
    return roles(model, Batch(duplicate(batch.args), duplicate(batch.kwargs)) if shown else None)


def _check(candidates: Sequence[Treatment], sensitivity: object) -> None:
    if not callable(sensitivity) and sensitivity not in get_args(Sensitivity):
        raise ValueError(f"sensitivity must be 'layers', 'outputs' or a callable, found {sensitivity!r}")
    wrong = [one for one in candidates if one not in TREATMENTS]
    if isinstance(candidates, str) or wrong or not candidates or len(set(candidates)) < len(candidates):
        raise ValueError(f"candidates must be different ones of {', '.join(TREATMENTS)}, found {candidates!r}")
    if candidates[0] == ORIGINAL or ORIGINAL in candidates[:-1]:
        raise ValueError(f"candidates must begin with a scheme, and 'original' comes last; found {candidates!r}")


class _Session:
    """One search: its layers, what was run, and what each run gave."""

    def __init__(
        self,
        variants: Variants,
        metric: Metric,
        budget: float,
        candidates: Sequence[Treatment],
        kept: Mapping[str, str],
        observed: Mapping[str, Role],
    ) -> None:
        self.variants, self.metric, self.budget = variants, metric, budget
        self.candidates, self.kept, self.roles = candidates, kept, observed
        self.choices: dict[str, Choices] = variants.choices
        self.start: Assignment = {name: next(iter(one.sizes)) for name, one in self.choices.items()}
        self.points: dict[tuple[Treatment, ...], Point] = {}
        self.overflowed: dict[str, list[Treatment]] = {}
        self.notes: list[str] = []

    def tune(self, sensitivity: Sensitivity | Sensitivities) -> Tuning:
        self._original()
        self.variants.prepare()
        with counting(2 + len(self.candidates), what="tuning", unit="run") as self.bar:
            if not self._start():
                return self._search(sensitivity)
        return self._tuning(self.start)

    def _original(self) -> None:
        """Runs the original; where every layer may stay one, that is a point, too."""
        best = self.variants.observe_original()
        whole: Assignment = dict.fromkeys(self.choices, ORIGINAL)
        if ORIGINAL in self.candidates:
            self._add(whole, best)
        if not self.metric.meets(best, self.budget):
            raise ValueError(
                f"no variant meets the budget: the {self.metric.name} of the original with itself is {best:.4g}, and "
                f"the budget is {self.budget:.4g}{' at least' if self.metric.higher else ''}"
            )

    def _start(self) -> bool:
        """Runs the preferred treatments; what overflows gets the next one. Whether the budget is met."""
        while True:
            met, finite = self._run(self.start)
            name = None if finite else self.variants.first_not_finite(self.start)
            if name is None:
                return met
            sizes = list(self.choices[name].sizes)
            rest = sizes[sizes.index(self.start[name]) + 1 :]
            self.overflowed.setdefault(name, []).append(self.start[name])
            if not rest:
                raise ValueError(
                    f"{name} gives outputs that are not finite with {' and '.join(self.overflowed[name])}: let it be "
                    "'original', or leave it out with module_filter"
                )
            self.start = {**self.start, name: rest[0]}

    def _search(self, sensitivity: Sensitivity | Sensitivities) -> Tuning:
        for candidate in self.candidates[1:]:
            if candidate != ORIGINAL:
                self._run({name: self._raised(name, candidate) for name in self.choices})
        self.variants.restore()
        search = Search(self._layers(sensitivity), self.start, lambda trial: self._run(trial)[0])
        sequence = search.sequence()
        if not self._run(sequence[-1])[0]:
            self._give_up()
        found = search.first_that_meets(sequence)
        for point in self.points.values():
            if point.met and search.cost(dict(point.assignment)) < search.cost(found):
                found = dict(point.assignment)
        first = {name: place for place, step in reversed([*enumerate(sequence)]) for name in _changed(step, self.start)}
        return self._tuning(search.take_back(found, sorted(first, key=lambda name: -first[name])))

    def _raised(self, name: str, candidate: Treatment) -> Treatment:
        """The candidate if the layer can have it, and is not on a more precise one already."""
        sizes = list(self.choices[name].sizes)
        return candidate if candidate in sizes[sizes.index(self.start[name]) :] else self.start[name]

    def _layers(self, sensitivity: Sensitivity | Sensitivities) -> list[Layer]:
        noise: dict[str, dict[Treatment, float]] = {name: {ORIGINAL: 0.0} for name in self.choices}
        for candidate in self.candidates:
            names = [name for name, one in self.choices.items() if candidate in one.sizes]
            names = [name for name in names if candidate not in self.overflowed.get(name, ())]
            if candidate == ORIGINAL or not names:
                continue
            found = (
                self._alone(names, candidate) if sensitivity == "outputs" else self._told(sensitivity, names, candidate)
            )
            for name in names:
                noise[name][candidate] = found.get(name, 1.0)
        for name, treatments in self.overflowed.items():
            noise[name].update(dict.fromkeys(treatments, math.inf))
        return [
            Layer(name=name, sizes=one.sizes, noise=noise[name], role=self.roles.get(name, "other"))
            for name, one in self.choices.items()
        ]

    def _alone(self, names: Sequence[str], candidate: Treatment) -> dict[str, float]:
        """The metric with each layer alone in FP8, as something of which less is better."""
        found = {}
        for name in names:
            value, _ = self.variants.value({name: candidate})
            found[name] = 10 ** (-value / 10) if self.metric.higher else max(value, 0.0)
            self.bar.update()
        self.variants.restore()
        return found

    def _told(self, sensitivity: Any, names: Sequence[str], candidate: Treatment) -> Mapping[str, float]:
        scheme: Any = candidate
        given = replace(self.variants.options, scheme=scheme)
        function: Sensitivities = sensitivity if callable(sensitivity) else _measured
        try:
            return function(self.variants.model, list(self.variants.data), given, names)
        except ValueError as error:  # the search goes on with roles alone
            self.notes.append(f"sensitivities with {candidate} are not known: {error}")
            return {}

    def _run(self, wanted: Assignment) -> tuple[bool, bool]:
        """Whether a variant meets the budget, and whether its outputs are finite; it is run once."""
        known = self.points.get(tuple(wanted.values()))
        if known is None:
            value, finite = self.variants.value(wanted)
            self.bar.update()
            known = self._add(wanted, value, finite=finite)
        return known.met, known.finite

    def _add(self, wanted: Assignment, value: float, *, finite: bool = True) -> Point:
        point = Point(
            bytes=sum(self.choices[name].sizes[treatment] for name, treatment in wanted.items()),
            value=value,
            met=finite and self.metric.meets(value, self.budget),
            finite=finite,
            assignment=dict(wanted),
            recipe=self._recipe(wanted),
        )
        self.points[tuple(wanted.values())] = point
        return point

    def _recipe(self, wanted: Assignment) -> Recipe:
        given = self.variants.given
        common = Counter(treatment for treatment in wanted.values() if treatment != ORIGINAL).most_common(1)
        scheme: Any = common[0][0] if common else self.candidates[0]
        layers: Assignment = {name: treatment for name, treatment in wanted.items() if treatment != scheme}
        layers.update({name: ORIGINAL for name, reason in self.kept.items() if reason.startswith("module_filter")})
        return Recipe(options=replace(given, scheme=scheme), layers=layers)

    def _give_up(self) -> None:
        sign = -1 if self.metric.higher else 1
        best = min(self.points.values(), key=lambda point: sign * point.value)
        raise ValueError(
            f"no variant meets the budget of {self.budget:.4g} {self.metric.unit}".rstrip()
            + f": the best of {len(self.points)} has a {self.metric.name} of {best.value:.4g} with {best.bytes} bytes "
            f"({best.counts}). Allow "
            + ("more" if not self.metric.higher else "less")
            + ("" if ORIGINAL in self.candidates else ", or add 'original' to the candidates")
        )

    def _tuning(self, chosen: Assignment) -> Tuning:
        point = self.points[tuple(chosen.values())]
        if set(chosen.values()) == {ORIGINAL}:
            self.notes.append("only the original meets the budget: the recipe converts nothing")
        return Tuning(
            recipe=point.recipe,
            point=point,
            points=tuple(sorted(self.points.values(), key=lambda one: (one.bytes, one.value))),
            metric=self.metric.name,
            unit=self.metric.unit,
            higher_is_better=self.metric.higher,
            budget=self.budget,
            bytes_before=sum(_original_size(one) for one in self.choices.values()),
            runs=self.variants.runs,
            roles={name: self.roles.get(name, "other") for name in self.choices},
            overflowed={name: tuple(treatments) for name, treatments in self.overflowed.items()},
            kept=dict(self.kept),
            notes=tuple(self.notes),
        )


def _original_size(choices: Choices) -> int:
    weight = choices.step.module._parameters[choices.step.parameter]
    assert weight is not None
    return weight.numel() * weight.dtype.itemsize


def _changed(step: Assignment, start: Assignment) -> list[str]:
    return [name for name in step if step[name] != start[name]]


def _measured(model: nn.Module, data: list[Batch], options: FP8GemmOptions, names: Sequence[str]) -> dict[str, float]:
    """The relative noise power of each layer's output, 10 ** (-SQNR / 10)."""
    wanted = set(names)
    found = measure(model, data, options=options, module_filter=lambda name, module: name in wanted)
    return {"" if one.name == ITSELF else one.name: 10 ** (-one.sqnr / 10) for one in found.layers if one.measured}
