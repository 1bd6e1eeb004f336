"""What tune refuses, and what it says then."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, tune

EXACT = FP8GemmOptions(engine="reference")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"calibration_inputs": []}, "calibration_inputs has no batches"),
        ({"budget": math.nan}, "budget must be a number, found nan"),
        ({"budget": "small"}, "budget must be a number, found 'small'"),
        ({"metric": "sqnr"}, "metric must be one of cosine, kl, psnr or a callable, found 'sqnr'"),
        ({"metric": lambda y, y8: y}, "the metric <lambda> must return a number, lower is better; found Tensor"),
        ({"metric": lambda y, y8: None}, "the metric <lambda> must return a number, lower is better; found NoneType"),
        ({"candidates": ()}, "candidates must be different ones of original, row"),
        ({"candidates": ("row", "row")}, "candidates must be different ones"),
        ({"candidates": ("row", "mx")}, "candidates must be different ones of original, row, tensor"),
        ({"candidates": ("original", "row")}, "candidates must begin with a scheme, and 'original' comes last"),
        ({"sensitivity": "sqnr"}, "sensitivity must be 'layers', 'outputs' or a callable, found 'sqnr'"),
        ({"module_filter": "nothing"}, "module_filter pattern 'nothing' matches no layer"),
        ({"model": nn.ReLU()}, "nothing to convert: ReLU has no other layer"),
        ({"budget": -1.0}, "no variant meets the budget: the cosine distance of the original with itself is 0"),
        ({"budget": 1e-9, "candidates": ("row", "weight_only")}, "no variant meets the budget of 1e-09: the best of 2"),
        (
            {"budget": 90, "metric": "psnr", "candidates": ("row",)},
            r"of 90 dB: the best of 1 has a PSNR of .* less, or",
        ),
    ],
)
def test_errors(given: dict[str, Any], message: str) -> None:
    defaults = {"model": nn.Linear(64, 64), "calibration_inputs": torch.randn(3, 64), "budget": 0.1, "options": EXACT}
    arguments = {**defaults, **given}
    with pytest.raises(ValueError, match=message):
        tune(arguments.pop("model"), arguments.pop("calibration_inputs"), **arguments)


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"tune takes an nn\.Module, found dict"):
        tune({}, torch.ones(1), budget=1)


def test_an_original_that_is_not_finite() -> None:
    with pytest.raises(
        ValueError, match="the original model itself gives outputs that are not finite, on batch 2 of 2"
    ):
        tune(nn.Linear(8, 8), [torch.ones(1, 8), torch.full((1, 8), math.inf)], budget=1)
    with pytest.raises(ValueError, match="the model's output has no floating-point tensor to compare: Tensor"):
        tune(nn.Sequential(nn.Linear(8, 8), Ids()), torch.ones(1, 8), budget=1)


class Ids(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(-1)


def test_patched_models() -> None:
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(
        ValueError, match=r"0\.weight is on FP8 already, and its original was discarded: load the model"
    ):
        tune(model, torch.ones(1, 64), budget=1)
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 64)), options=FP8GemmOptions(fp16_weight_storage="keep"))
    with pytest.raises(ValueError, match=r"0\.weight is on FP8 already: call disable_fp8_gemm\(model\) and tune it"):
        tune(model, torch.ones(1, 64), budget=1)
    with pytest.raises(ValueError, match=r"0\.weight is on meta: load the model's weights before it is tuned"):
        tune(nn.Sequential(nn.Linear(64, 64, device="meta")), torch.ones(1, 64), budget=1)
