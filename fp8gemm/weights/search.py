"""How the scales and codes of a weight are chosen, beyond rounding to nearest with the scale of the largest value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..scaled import FP8GemmOptions, ScaledTensor, Scheme, WeightSearch
from .compensation import compensated
from .quantization import quantize_weight, searched_scale


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What the products with a weight ``[(E,) N, K]`` were given on the calibration inputs.

    ``squares [(E,) K]`` are the sums of the squared activations of each input channel, float32; ``tokens`` is their
    number, of each expert of a stack. ``gram [(E,) K, K]`` is the sum of their outer products, where it was collected.
    """

    squares: torch.Tensor
    tokens: tuple[int, ...]
    gram: torch.Tensor | None = None

    @property
    def importance(self) -> torch.Tensor:
        """The mean squares ``[(E,) K]``; 1 for experts that were given no tokens, or zeros only."""
        count = self.squares.new_tensor(self.tokens).clamp(min=1)
        mean = self.squares / (count[:, None] if self.squares.dim() == 2 else count)
        return torch.where((mean > 0).any(dim=-1, keepdim=True), mean, 1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Search:
    """How one weight is quantized: what ``FP8GemmOptions.weight_search`` asks for, and what is known of its inputs.

    ``text`` is what the report says of it. ``weight`` is the result where it was computed in advance.
    """

    method: WeightSearch
    text: str
    importance: torch.Tensor | None = None
    weight: ScaledTensor | None = None

    @property
    def repeats(self) -> bool:
        """Whether quantizing the same values again gives the same bytes: rounding needs the inputs' whole matrix."""
        return self.method != "rounding"

    def kept(self) -> Search:
        """What a weight remembers of it."""
        return replace(self, weight=None)

    def written(self, *, whole: bool = False) -> Search:
        """The search of a weight that was written to, and of which ``whole`` was quantized again, or only what changed.

        A whole weight is searched again as before; what changed, and what needs the inputs' whole matrix, is not.
        """
        if whole and self.repeats:
            return self
        after = ", to nearest since it was written to"
        return self if self.text.endswith(after) else replace(self, text=self.text + after)


def unweighted(why: str = "") -> Search:
    """A search for scales in which all columns count alike."""
    return Search(method="scales", text="scales, unweighted" + (f": {why}" if why else ""))


def weighted(inputs: Inputs, why: str = "") -> Search:
    """A search for scales, with errors weighted by the second moments of the inputs."""
    text = f"scales, weighted by {_counted(inputs)}" + (f": {why}" if why else "")
    return Search(method="scales", text=text, importance=inputs.importance)


def rounded(w: torch.Tensor, options: FP8GemmOptions, scheme: Scheme, inputs: Inputs) -> Search:
    """Error-compensated rounding of ``w [(E,) N, K]``, done now, as the matrix of the inputs is too large to keep."""
    assert inputs.gram is not None
    w, stack = w.detach(), w.dim() == 3
    moments, grams = inputs.importance, inputs.gram
    matrices = list(zip(w, moments, grams, strict=True)) if stack else [(w, moments, grams)]
    data = torch.empty(w.shape, dtype=options.weight_dtype, device=w.device)
    scale = torch.empty(scheme.weight.scale_shape(w.shape), dtype=torch.float32, device=w.device)
    form: dict[str, Any] = {"dtype": options.weight_dtype, "scale_format": scheme.scale_format}
    plain = groups = 0
    for place, (matrix, importance, gram) in enumerate(matrices):
        best = searched_scale(matrix, scheme.weight, importance=importance, **form)
        found = compensated(matrix, best, quantize_weight(matrix, scheme.weight, **form), gram)
        own = place if stack else slice(None)
        data[own], scale[own] = found.weight.data, found.weight.scale
        plain, groups = plain + found.plain, groups + found.groups
    what = f", {plain} of {groups} groups of rows to nearest" if plain else ""
    text = f"rounding, {_counted(inputs)}{what}"
    return Search(method="rounding", text=text, weight=ScaledTensor(data, scale, scheme.weight))


def _counted(inputs: Inputs) -> str:
    """The number of tokens, and for how many experts of a stack there are none."""
    text = f"{sum(inputs.tokens)} tokens"
    without = sum(count == 0 for count in inputs.tokens)
    return text if not without else f"{text}, none for {without} of {len(inputs.tokens)} experts"
