"""The metrics of outputs, and which part of an output they compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fp8gemm import FP8GemmOptions, tune
from fp8gemm.analysis.metrics import METRICS

EXACT = FP8GemmOptions(engine="reference")


@pytest.mark.parametrize(
    ("name", "y", "y8", "expected"),
    [
        ("cosine", [[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [3.0, 0.0]], 0.5),
        ("cosine", [[0.0, 0.0]], [[0.0, 0.0]], 0.0),
        ("kl", [[0.0, 0.0]], [[0.0, math.log(3)]], 0.5 * math.log(4 / 3)),
        ("kl", [[0.0, -math.inf]], [[0.0, 0.0]], math.log(2)),
        ("psnr", [[0.0, 10.0]], [[1.0, 9.0]], 20.0),
        ("psnr", [[1.0, 2.0]], [[1.0, 2.0]], math.inf),
    ],
)
def test_metrics(name: str, y: list[Any], y8: list[Any], expected: float) -> None:
    found = METRICS[name].measure([(torch.tensor(y, dtype=torch.float64), torch.tensor(y8, dtype=torch.float64))])
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("made", [
    lambda x: {"hidden": x * 0, "logits": x},
    lambda x: (torch.arange(3), [x, x * 0]),
    lambda x: {"a": x},
])  # fmt: skip
def test_which_output_is_compared(made: Callable[[torch.Tensor], Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> Any:
            return made(self.layer(x))

    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    expected = tune(Model().layer, x, budget=1.0, options=EXACT).value
    assert tune(Model(), x, budget=1.0, options=EXACT).value == expected > 0
