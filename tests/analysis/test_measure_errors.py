"""What measure refuses: values that are not finite, models and inputs that it cannot measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, measure

EXACT = FP8GemmOptions(engine="reference")


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(k, n) for k, n in pairwise(sizes))).eval()


def poisoned(value: float) -> tuple[nn.Module, torch.Tensor]:
    model, x = mlp(64, 32, 16), torch.randn(4, 64)
    with torch.no_grad():
        model[1].bias[3] = value
    return model, x


@pytest.mark.parametrize(("value", "said"), [(math.nan, "NaN"), (math.inf, "infinity")])
def test_what_the_original_makes_of_finite_inputs(value: float, said: str) -> None:
    model, x = poisoned(value)
    with pytest.raises(ValueError, match=rf"^1: the original itself gives {said} on batch 1 of 2, on finite inputs$"):
        measure(model, [x, x])
    x = torch.full((4, 64), math.nan)
    with pytest.raises(ValueError, match=r"^0: .* batch 2 of 2, as some of its inputs are not finite$"):
        measure(mlp(64, 32), [torch.randn(4, 64), x])


def test_what_fp8_makes_of_finite_values() -> None:
    """float16 products that overflow only with weights that were rounded up."""
    layer = nn.Linear(32, 32, bias=False).half()
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[:, 0] = 1.03  # so that 1.0 becomes 1.03, too
    x = torch.full((2, 32), 2040.0).half()
    assert torch.isfinite(layer(x)).all()
    with pytest.raises(
        ValueError, match=r"^\(the model itself\): FP8 gives infinity .* is finite \(weight row, activation"
    ):
        measure(layer, x, options=EXACT)


@pytest.mark.parametrize(
    ("act", "error", "said"),
    [
        (lambda: measure("model", torch.ones(1)), TypeError, "measure takes an nn.Module, found str"),
        (lambda: measure(mlp(8, 8), []), ValueError, "calibration_inputs has no batches"),
        (lambda: measure(nn.ReLU(), torch.ones(1)), ValueError, "nothing to convert: ReLU has no other layer"),
        (lambda: measure(mlp(8, 8), torch.ones(1, 8), module_filter="x"), ValueError, "pattern 'x' matches no layer"),
        (lambda: measure(enable_fp8_gemm(mlp(8, 8)), torch.ones(1, 8)), ValueError, "nothing to compare 0 with"),
        (lambda: measure(mlp(8, 8).to("meta"), torch.ones(1, 8)), ValueError, "0.weight is on meta: load"),
        (lambda: measure(mlp(8, 8), torch.ones(1, 9)), RuntimeError, "cannot be multiplied"),
    ],
)
def test_what_cannot_be_measured(act: Callable[[], object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        act()


def test_patched_models_are_measured_as_they_are() -> None:
    model = enable_fp8_gemm(mlp(8, 8, 8), options=FP8GemmOptions(fp16_weight_storage="keep"), module_filter="0")
    with pytest.raises(ValueError, match="is patched, and its layers are measured as they are: leave options out"):
        measure(model, torch.ones(1, 8), options=FP8GemmOptions())
    with pytest.raises(ValueError, match="pattern 'y' matches no layer in FP8"):
        measure(model, torch.ones(1, 8), module_filter=["0", "y"])
    assert measure(model, torch.ones(1, 8)).kept == {"1": "module_filter"}
