"""What ``measure`` found: a row for each layer, and the whole model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..text import columns
from .measurement_page import decibel_text, measurement_page, outliers_text, saturated_text

Figure = Literal["sqnr", "p50", "p1", "worst"]


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What FP8 changes in the output of one layer, and what its inputs are like.

    All of ``sqnr``, ``p50``, ``p1`` and ``worst`` are in dB, infinite where FP8 gives the same bits, and NaN for a
    layer that was not measured; ``reason`` says why then.

    Attributes:
        name: of the layer, as in ``report(model)``: the module's, or the parameter's if that is not ``weight``.
        shape: of the weight, ``(N, K)`` or ``(experts, N, K)``.
        scheme: what the engine applied; it keeps activations where the engine does not round them.
        role: what the layer is for in the model; empty if that is not known.
        depth: the number of its block; None outside of numbered blocks.
        calls: how often it ran on the calibration inputs; 0 if never.
        tokens: how many tokens it gave, all calls together.
        sqnr: ``10 log10(sum |y|^2 / sum |y - y8|^2)`` over all outputs.
        p50: the SQNR that half of the tokens do not exceed.
        p1: the SQNR that one token in a hundred does not exceed.
        worst: the smallest SQNR of a token.
        outlier_channels: the input channels whose largest magnitude is more than 20 times the median channel's; None if
            the inputs were not seen.
        outlier_tokens: how many inputs' largest magnitude is more than 20 times the median one's.
        saturated: the share of activations beyond the range of FP8, from 0 to 1; 0 where scales are dynamic.
        saturated_weights: the share of weights beyond that range.
        ties: other names of the same weight.
        reason: why the layer was not measured; empty if it was.

    Example:
        >>> layer = LayerError(name="head", shape=(32, 64), calls=1, tokens=8, sqnr=31.5, p50=31.8, p1=29.0, worst=28.9)
        >>> layer.measured, layer.to_dict()["sqnr"]
        (True, 31.5)
    """

    name: str
    shape: tuple[int, ...]
    scheme: str = ""
    engine: str = ""
    role: str = ""
    depth: int | None = None
    calls: int = 0
    tokens: int = 0
    sqnr: float = math.nan
    p50: float = math.nan
    p1: float = math.nan
    worst: float = math.nan
    outlier_channels: tuple[int, ...] | None = None
    outlier_tokens: int | None = None
    saturated: float = 0.0
    saturated_weights: float = 0.0
    ties: tuple[str, ...] = ()
    reason: str = ""

    @property
    def measured(self) -> bool:
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        """Plain types that JSON can hold: infinities are the strings "inf" and "-inf", NaN is None."""
        return {key: _plain(value) for key, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """The error of the whole model's output with all layers in FP8, in dB, as of a layer; errors of layers add up.

    A model that returns no floating-point tensor has 0 ``tokens``, and NaN.
    """

    tokens: int
    sqnr: float
    p50: float
    p1: float
    worst: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The output error of each layer by itself, and that of the whole model; ``str`` of it is a table.

    Attributes:
        layers: in the order of the model, those that were not measured too.
        output: of the whole model.
        kept: why other matrices stay dense, by their names.

    Example:
        >>> from torch import nn
        >>> from fp8gemm import measure
        >>> found = measure(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(5, 64))
        >>> found.output.tokens, [layer.tokens for layer in found.layers]
        (5, [5, 5])
    """

    layers: tuple[LayerError, ...]
    output: OutputError
    kept: Mapping[str, str]

    def worst(self, n: int = 5, *, by: Figure = "sqnr") -> tuple[LayerError, ...]:
        """The ``n`` measured layers with the smallest SQNR, the smallest first; ``by`` may be that of tokens instead.

        A few tokens whose outputs are much larger than all others dominate the sums of ``sqnr``; ``p50`` shows then
        what happens to the others.
        """
        if by not in get_args(Figure):
            raise ValueError(f"by must be one of {', '.join(get_args(Figure))}, found {by!r}")
        return tuple(
            sorted((layer for layer in self.layers if layer.measured), key=lambda layer: getattr(layer, by))[:n]
        )

    def to_dict(self) -> dict[str, Any]:
        """The whole measurement in plain types, as ``LayerError.to_dict`` gives them."""
        output = {key: _plain(value) for key, value in asdict(self.output).items()}
        return {"output": output, "layers": [layer.to_dict() for layer in self.layers], "kept": dict(self.kept)}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """``to_dict`` as JSON text, which is also written to ``path`` if that is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """A page with heat maps of the model and a table, which is also written to ``path`` if that is given."""
        text = measurement_page(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        measured = self.worst(len(self.layers))
        rows: list[tuple[str, ...]] = [_HEADER, *(_cells(layer) for layer in measured)]
        rows += [(layer.name, _size(layer.shape), layer.reason) for layer in self.layers if not layer.measured]
        tokens = self.output.tokens
        figures = (str(tokens), *_decibels(self.output)) if tokens else ("no floating-point tensor",)
        rows.append(("the model's output", "", *figures))
        lines = ["; ".join(sorted({f"{layer.scheme} on {layer.engine}" for layer in measured})), *columns(rows)]
        if self.kept:
            lines.append(f"{len(self.kept)} other {'matrices stay' if len(self.kept) > 1 else 'matrix stays'} dense")
        return "\n".join(line for line in lines if line)


_HEADER = ("layer, worst first", "weight", "tokens", "SQNR dB", "p50", "p1", "worst", "outliers", "saturated")


def _cells(layer: LayerError) -> tuple[str, ...]:
    return (
        " = ".join((layer.name, *layer.ties)),
        _size(layer.shape),
        str(layer.tokens),
        *_decibels(layer),
        outliers_text(layer),
        saturated_text(layer),
    )


def _decibels(found: LayerError | OutputError) -> list[str]:
    return [decibel_text(value) for value in (found.sqnr, found.p50, found.p1, found.worst)]


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return list(value) if isinstance(value, tuple) else value
