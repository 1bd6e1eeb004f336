"""What calibration inputs give each weight that will be converted, and how its scales and codes are chosen from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..scaled import FP8GemmOptions
from ..weights.convert import scheme_for
from ..weights.geometry import Layout
from ..weights.search import Inputs, Search, rounded, unweighted, weighted
from .batches import Batch, batches
from .inputs import Given, run
from .selection import Conversion

# Bytes of the matrices of inputs that are collected in one pass over the calibration inputs; at least one weight's.
_BYTES_AT_ONCE = 2**29
UNSEEN = "no product with it was seen"
LOOKED_UP = "its rows are also looked up"


def refuse(options: FP8GemmOptions, calibration_inputs: object, *, waits: bool) -> None:
    """Raises ValueError where ``weight_search`` and the calibration inputs do not go together."""
    method = options.weight_search
    if calibration_inputs is not None and method == "none":
        raise ValueError(
            "calibration_inputs have no effect with weight_search='none': choose 'scales' or 'rounding' in "
            "FP8GemmOptions, or for static scales call fp8gemm.calibrate(model, calibration_inputs) after patching"
        )
    if method == "rounding" and calibration_inputs is None:
        raise ValueError(
            "weight_search='rounding' needs calibration_inputs: enable_fp8_gemm(model, options=..., "
            "calibration_inputs=batches); weight_search='scales' does without them"
        )
    if method == "rounding" and not options.materialize_fp8_on_wrap:
        raise ValueError(
            "weight_search='rounding' quantizes while patching, when it has the inputs: use "
            "materialize_fp8_on_wrap=True, or weight_search='scales'"
        )
    if calibration_inputs is not None and waits:
        raise ValueError(
            "calibration_inputs and example_inputs='first call' exclude each other: the first call comes later; give "
            "one of the calibration inputs as example_inputs"
        )


def searches(
    model: nn.Module, steps: Sequence[Conversion], options: FP8GemmOptions, calibration_inputs: object
) -> dict[int, Search]:
    """How each weight that will be converted is quantized, by the id of the parameter; the model is not changed.

    Second moments of all weights are collected in one pass. The matrices of inputs that rounding needs take ``K * K``
    floats each, so they are collected for a few weights at a time, in as many passes; the rounded weights wait in
    memory until all are known.

    Raises:
        ValueError: an input of a weight has NaN or infinite values, or a weight is on meta; with the weight's name.
    """
    if options.weight_search == "none":
        return {}
    if calibration_inputs is None:
        return {}
    empty = next((step.full_name for step in steps if step.converts and step.tensor.is_meta), None)
    if empty is not None:
        raise ValueError(f"{empty} is on meta, so the model cannot run on calibration_inputs: load its weights first")
    wanted = [step for step in steps if step.converts and step.multiplied and type(step.tensor) is nn.Parameter]
    inputs, found = batches(calibration_inputs), {}
    rounds = options.weight_search == "rounding"
    for group in _groups(wanted) if rounds else [wanted]:
        collected = _collect(model, inputs, group, gram=rounds)
        for step in group:
            seen = collected.pop(step.full_name)
            found[id(step.tensor)] = _search(step, options, seen)
    others = (step for step in steps if step.converts and id(step.tensor) not in found)
    return found | {id(step.tensor): unweighted(UNSEEN) for step in others}


def _search(step: Conversion, options: FP8GemmOptions, seen: _Sums) -> Search:
    inputs = seen.inputs()
    if inputs is None:
        return unweighted(UNSEEN)
    if inputs.gram is None:
        return weighted(inputs, LOOKED_UP if options.weight_search == "rounding" else "")
    layout, options = step.layout, step.effective(options)
    values = step.tensor.detach()
    plain = layout.plain(values if layout.folded is None else values.contiguous())
    return rounded(plain, options, scheme_for(options, step.parameter, layout.shape), inputs)


def _groups(steps: Sequence[Conversion]) -> Iterator[list[Conversion]]:
    """The weights whose matrices of inputs fit in memory together."""
    group: list[Conversion] = []
    size = 0
    for step in steps:
        *experts, _, k = step.layout.shape
        own = 4 * k * k * (experts[0] if experts else 1)
        if group and size + own > _BYTES_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(step)
        size += own
    if group:
        yield group


@dataclass
class _Sums:
    """The sums over tokens of what a weight was given; on the device of the activations."""

    name: str
    layout: Layout
    wants_gram: bool
    squares: torch.Tensor | None = None
    gram: torch.Tensor | None = None
    tokens: list[int] = field(default_factory=list)

    def add(self, given: Given) -> None:
        x = given.x.detach().to(torch.float32)
        *experts, _, k = self.layout.shape
        if self.squares is None:
            count = experts[0] if experts else 1
            self.squares = torch.zeros(count, k, dtype=torch.float32, device=x.device)
            self.tokens = [0] * count
            if self.wants_gram:
                self.gram = torch.zeros(count, k, k, dtype=torch.float32, device=x.device)
        squares = x.square().sum(dim=0)
        if not bool(squares.isfinite().all()):
            raise ValueError(f"{self.name}: the calibration inputs give it NaN or infinite activations")
        columns = slice(given.first_column, given.first_column + x.shape[1])
        self.squares[given.expert, columns] += squares
        if self.gram is not None:
            self.gram[given.expert, columns, columns] += x.t() @ x
        self.tokens[given.expert] += x.shape[0]

    def inputs(self) -> Inputs | None:
        """The sums, with a dimension of experts only for a stack; None if there was no token."""
        if self.squares is None or not any(self.tokens):
            return None
        found = Inputs(squares=self.squares, tokens=tuple(self.tokens), gram=self.gram)
        if len(self.layout.shape) == 3:
            return found
        return replace(found, squares=self.squares[0], gram=None if self.gram is None else self.gram[0])


def _collect(model: nn.Module, inputs: list[Batch], steps: Sequence[Conversion], *, gram: bool) -> dict[str, _Sums]:
    # Rounding moves the values of a row away from the original's, for the sake of its products: not of embeddings.
    grams = {step.full_name: gram and not any(place.role.looked_up for place in step.places) for step in steps}
    sums = {step.full_name: _Sums(step.full_name, step.layout, grams[step.full_name]) for step in steps}
    weights = {step.full_name: (step.tensor, step.layout) for step in steps}
    run(model, inputs, weights, lambda name, given: sums[name].add(given))
    return sums
