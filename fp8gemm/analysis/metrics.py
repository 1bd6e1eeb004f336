"""How far the outputs of a converted model are from the original's, over all calibration inputs."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from .probes import first_tensor

MetricName = Literal["cosine", "kl", "psnr"]
OutputMetric = Callable[[Any, Any], float]
_PREFERRED = ("logits", "last_hidden_state", "sample")  # of the fields of an output, the one that is compared


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number for all outputs of a model, from the original's and its own.

    Attributes:
        name: what it is called in tables.
        unit: of the number.
        higher: whether more is better.
        keep: what of an output it needs.
        measure: the number, from pairs of the original's and the converted model's.
    """

    name: str
    unit: str = ""
    higher: bool = False
    keep: Callable[[Any], Any]
    measure: Callable[[Iterable[tuple[Any, Any]]], float]

    def meets(self, value: float, budget: float) -> bool:
        return not math.isnan(value) and (value >= budget if self.higher else value <= budget)

    @property
    def worst(self) -> float:
        return -math.inf if self.higher else math.inf


def metric_of(metric: MetricName | OutputMetric) -> Metric:
    """The metric of a name, or one that means a function's results over the batches.

    Raises:
        ValueError: there is no such metric.
    """
    if callable(metric):
        function: OutputMetric = metric
        name = getattr(metric, "__name__", type(metric).__name__)
        return Metric(name=name, keep=whole_output, measure=lambda pairs: _mean(function, name, pairs))
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)} or a callable, found {metric!r}")
    return METRICS[metric]


def main_output(output: Any) -> torch.Tensor:
    """The tensor of an output that is compared: itself, its logits, last hidden state or sample, or the first
    floating-point tensor in it; a copy.

    Raises:
        ValueError: there is none.
    """
    found = None
    for name in _PREFERRED:
        found = found if found is not None else _field(output, name)
    tensor = first_tensor(output if found is None else found)
    if tensor is None:
        raise ValueError(f"the model's output has no floating-point tensor to compare: {type(output).__name__}")
    return tensor.detach().clone()


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def whole_output(output: Any) -> Any:
    """A copy of an output, as it is."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, output)


def _cosine(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The mean of 1 - cos over the rows of the last dimension."""
    total, count = 0.0, 0
    for y, y8 in pairs:
        one, other = _rows(y), _rows(y8)
        same = (one == other).all(-1)
        total += float((1 - F.cosine_similarity(one, other)).clamp(min=0).masked_fill(same, 0).sum())
        count += one.shape[0]
    return total / max(count, 1)


def _kl(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The mean of sum p (log p - log q) over the rows of logits, in nats, with p the original's probabilities."""
    total, count = 0.0, 0
    for y, y8 in pairs:
        p, q = _rows(y).log_softmax(-1), _rows(y8).log_softmax(-1)
        each = p.exp() * (p - q)
        total += float(each.masked_fill(p.isneginf(), 0).sum().clamp(min=0))
        count += p.shape[0]
    return total / max(count, 1)


def _psnr(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """10 log10(peak^2 / mean squared error), where the peak is the range of the original's outputs."""
    error, count, least, most = 0.0, 0, math.inf, -math.inf
    for y, y8 in pairs:
        difference = y8.double() - y.double()
        error += float(difference.square().sum())
        count += difference.numel()
        least, most = min(least, float(y.min())), max(most, float(y.max()))
    if not error:
        return math.inf
    return 10 * math.log10(max((most - least) ** 2, 1e-300) / (error / count))


def _rows(y: torch.Tensor) -> torch.Tensor:
    return y.double().reshape(-1, y.shape[-1] if y.dim() else 1)


def _mean(function: OutputMetric, name: str, pairs: Iterable[tuple[Any, Any]]) -> float:
    found: list[float] = []
    for y, y8 in pairs:
        value: Any = function(y, y8)
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
            value = value.item()
        if not isinstance(value, numbers.Real):
            raise ValueError(f"the metric {name} must return a number, lower is better; found {type(value).__name__}")
        found.append(float(value))
    return sum(found) / len(found)


METRICS: dict[str, Metric] = {
    "cosine": Metric(name="cosine distance", keep=main_output, measure=_cosine),
    "kl": Metric(name="KL divergence", unit="nats", keep=main_output, measure=_kl),
    "psnr": Metric(name="PSNR", unit="dB", higher=True, keep=main_output, measure=_psnr),
}
