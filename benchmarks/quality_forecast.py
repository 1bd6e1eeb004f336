"""Fracast, a forecaster of time series with 86 thousand parameters: what comes next?

The series are those of statsmodels: sunspots a year, carbon dioxide in the air a week, the temperature of the sea off
Peru a month, and orders of electrical equipment a month. The last steps of each are forecast from what came before.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import torch
from quality_cases import Case, Output, Task, folder
from quality_metrics import relative_error
from torch import nn

SERIES = ("sunspots/sunspots.csv", "co2/co2.csv", "elnino/elnino.csv", "elec_equip/elec_equip.csv")
WINDOWS = 3  # a series, each of the model's horizon, the last one at its end


def read(path: Path) -> torch.Tensor:
    """The values of a series in order; NaN where one is missing. The first column is the time."""
    rows = list(csv.reader(path.read_text().splitlines()))[1:]
    return torch.tensor([float(value or "nan") for row in rows for value in row[1:]], dtype=torch.float64)


def windows(series: torch.Tensor, horizon: int, count: int = WINDOWS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of a context and the ``horizon`` steps after it."""
    ends = [len(series) - horizon * index for index in range(count)]
    return [(series[: end - horizon], series[end - horizon : end]) for end in ends]


def scaled(context: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """The last ``length`` steps between 0 and 1, at the end of a row of that length; which are known; offset, span."""
    tail = context[-length:]
    known = tail.isfinite()
    low, high = tail[known].min().item(), tail[known].max().item()
    span = max(high - low, 1e-5)
    row, mask = torch.zeros(length), torch.zeros(length, dtype=torch.bool)
    row[length - len(tail) :] = torch.where(known, (tail - low) / span, 0.0).float()
    mask[length - len(tail) :] = known
    return row, mask, low, span


def scaled_error(forecast: torch.Tensor, context: torch.Tensor, future: torch.Tensor) -> float:
    """MASE: the mean absolute error over that of repeating the last value, one step ahead, in the context."""
    error = (forecast - future).abs().nanmean()
    return (error / context.diff().abs().nanmean()).item()


class Forecaster(nn.Module):
    """Both parts of Fracast as a module that is called with rows ``[series, length]`` and a mask of what is known."""

    def __init__(self, core: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.core, self.head = core, head

    def forward(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.core(rows[:, None], mask[:, None], mask[:, None].float())
        forecast: torch.Tensor = self.head.forward_horizon(hidden, last_obs=rows[:, -1:], ctx=rows, ctx_mask=mask)
        return forecast


def load() -> Task:
    from fracast.inference import load_fracast

    weights = folder("fracast") / "weights"
    settings = json.loads((weights / "config.json").read_text())["model"]
    median = settings["quantiles"].index(0.5)
    datasets = folder("statsmodels") / "datasets"
    pairs = [pair for name in SERIES for pair in windows(read(datasets / name), settings["horizon"])]
    rows, masks, lows, spans = zip(*(scaled(context, settings["W"]) for context, _ in pairs), strict=True)

    def errors(output: Output) -> list[float]:
        forecasts = output.values[..., median].double()
        offsets = zip(forecasts, lows, spans, pairs, strict=True)
        return [scaled_error(values * span + low, *pair) for values, low, span, pair in offsets]

    def measures(found: Output, dense: Output) -> dict[str, float]:
        mine, its = errors(found), errors(dense)
        changes = [abs(one - other) / other for one, other in zip(mine, its, strict=True)]
        medians = (output.values[..., median] for output in (found, dense))
        return {
            "MASE": math.fsum(mine) / len(mine),
            "largest change of a MASE %": 100 * max(changes),
            "medians moved %": 100 * relative_error(*medians),
        }

    inputs = torch.stack(rows), torch.stack(masks)
    model = Forecaster(*load_fracast(weights, weights="fp32")).eval()
    return Task(model=model, run=lambda model: Output(values=model(*inputs)), measures=measures)


CASE = Case(
    name="Fracast",
    kind="time series",
    packages={"fracast": "fracast==0.1.0", "statsmodels": "statsmodels"},
    license="Apache 2.0",
    score="MASE",
    agreement="largest change of a MASE %",
    load=load,
)
