"""Measuring models of many kinds: offloaded originals, code that multiplies by others' weights, caches, experts."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp8gemm import (
    ROW,
    TENSOR,
    FP8GemmOptions,
    Scheme,
    UnsupportedError,
    dequantize,
    enable_fp8_gemm,
    fuse_gated,
    fuse_siblings,
    measure,
    quantize,
    set_precision,
)
from fp8gemm.analysis.layers import PatchedLayer
from fp8gemm.analysis.tally import InputTally, saturated_weights
from fp8gemm.weights import convert

EXACT = FP8GemmOptions(engine="reference")
KEPT = FP8GemmOptions(engine="reference", fp16_weight_storage="keep")


def relative(y: torch.Tensor, y8: torch.Tensor) -> float:
    y, y8 = y.double(), y8.double()
    return 10 * math.log10(y.square().sum() / (y - y8).square().sum())


class Block(nn.Module):
    """Gated layers, and one whose weight the block multiplies by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 64), nn.Linear(32, 64)
        self.down_proj, self.lent = nn.Linear(64, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), self.lent.weight)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


X = torch.linspace(-2, 2, 5 * 32).sin().view(5, 32)


def test_code_that_multiplies_by_the_weight_of_another_module() -> None:
    block = Block()
    lent = measure(block, X).layers[3]
    assert (lent.name, lent.calls) == ("lent", 0)
    assert lent.reason == "other code multiplies by its weight, and so it gives no output of its own"


@pytest.mark.parametrize("fused", [False, True])
def test_originals_on_another_device_come_one_by_one(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = enable_fp8_gemm(Gated(), options=KEPT)
    if fused:
        fuse_siblings(model)
        fuse_gated(model)
        for _ in range(3):
            model(X)
    expected = measure(model, X)
    standing: list[int] = []
    dense = PatchedLayer._original

    def counted(layer: PatchedLayer) -> Any:
        standing.append(sum(not hasattr(part, "_home") for part in model.parameters() if part.dim() == 2))
        return dense(layer)

    monkeypatch.setattr(PatchedLayer, "resident", False)
    monkeypatch.setattr(PatchedLayer, "_original", counted)
    assert measure(model, X) == expected
    assert standing == [0, 0, 0]  # no other was dense


def test_originals_that_cannot_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = enable_fp8_gemm(Block(), options=FP8GemmOptions(fp16_weight_storage="keep"))
    assert measure(model, X).layers[3].calls == 0
    monkeypatch.setattr(PatchedLayer, "resident", False)
    with pytest.raises(UnsupportedError, match="lent is multiplied by outside of its layer, where its offloaded"):
        measure(model, X)


class Remembers(nn.Module):
    """Multiplies by a parameter of its own, adds to a list it is given, writes to its input, and draws noise."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x: torch.Tensor, seen: list[torch.Tensor]) -> dict[str, Any]:
        seen.append(torch.matmul(x, self.mix))
        x.mul_(2.0)
        return {"count": len(seen), "y": seen[-1] + torch.randn(1)}


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.counts = Remembers(), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        both = [self.part(x, seen) for _ in range(2)]
        self.counts.append([one["count"] for one in both])
        return both[0]["y"] + both[1]["y"]


def test_modules_that_change_what_they_are_given() -> None:
    """The second run of a module sees what the first one saw, and nothing of it stays."""
    model, x, before = Caller(), X.clone(), X.clone()
    torch.manual_seed(3)
    row = measure(model, x, options=EXACT, module_filter=lambda name, module: True).layers[0]
    assert x.equal(before)
    assert all(counts == [1, 2] for counts in model.counts)
    w = dequantize(quantize(model.part.mix.detach().t(), ROW))
    torch.manual_seed(3)
    with torch.no_grad():
        noise = [torch.randn(1) for _ in range(2)]
        y = torch.cat([X @ model.part.mix + noise[0], 2 * X @ model.part.mix + noise[1]])
        y8 = torch.cat(
            [dequantize(quantize(factor * X, ROW)) @ w.t() + one for factor, one in ((1, noise[0]), (2, noise[1]))]
        )
    assert row.sqnr == pytest.approx(relative(y, y8), rel=1e-4)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, generator: torch.Generator, lock: Any) -> torch.Tensor:
        with lock:
            return self.layer(x + torch.randn(x.shape, generator=generator))


def test_generators_give_all_runs_the_same_numbers() -> None:
    """What cannot be copied is passed on as it is."""
    generator, model = torch.Generator().manual_seed(0), Noisy()
    before = generator.get_state()
    found = measure(model, (X, generator, threading.Lock()))
    assert found.output.sqnr == pytest.approx(found.layers[0].sqnr)
    assert generator.get_state().equal(before)


class Experts(nn.Module):
    """Two stacks, of which the second gets an outlier channel that the first makes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 64, 32) / 6)
        self.down_proj = nn.Parameter(torch.randn(2, 32, 32) / 6)
        with torch.no_grad():
            self.gate_up_proj[1, 5] *= 2000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for up, down in zip(self.gate_up_proj, self.down_proj, strict=True):
            outputs.append(F.linear(F.linear(x, up)[:, :32], down))
        return torch.stack(outputs).sum(0)


def test_stacks_see_their_own_inputs() -> None:
    up, down = measure(nn.Sequential(Experts()), X).layers
    assert (up.name, down.name) == ("0.gate_up_proj", "0.down_proj")
    assert (up.outlier_channels, down.outlier_channels) == ((), (5,))


def test_compiled_models_and_fused_encoder_layers_are_measured_step_by_step() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    names = ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]
    expected = {row.name: row for row in measure(layer, X[None]).layers}
    assert sorted(expected) == sorted(names)
    assert all(row.measured for row in expected.values())
    found = measure(torch.compile(layer, backend="eager"), X[None]).layers
    assert [row.sqnr for row in found] == [row.sqnr for row in expected.values()]


def test_convolutions_have_positions_as_tokens() -> None:
    model, x = nn.Conv2d(3, 24, 4, stride=4), torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        x[:, 1] *= 100
        w = dequantize(quantize(model.weight.flatten(1), ROW)).view_as(model.weight)
        y, y8 = model(x).flatten(2), F.conv2d(x, w, model.bias, stride=4).flatten(2)
    options = FP8GemmOptions(engine="reference", scheme="weight_only")
    row = measure(model, x, options=options).layers[0]
    by_token = [relative(y[b, :, t], y8[b, :, t]) for b in range(2) for t in range(6)]
    assert row.tokens == 12
    assert row.worst == pytest.approx(min(by_token), rel=1e-3)
    assert row.sqnr == pytest.approx(relative(y, y8), rel=1e-3)
    assert row.outlier_channels == (1,)


@dataclass
class Output:
    ids: torch.Tensor
    hidden: torch.Tensor


class Returns(nn.Linear):
    """A subclass of Linear, whose products are found in its source."""

    result: Any = None

    def forward(self, x: torch.Tensor) -> Any:
        y = F.linear(x, self.weight, self.bias)
        return type(self).result(y)


@pytest.mark.parametrize("result", [lambda y: Output(y.argmax(-1), y), lambda y: (y.argmax(), [y, 2 * y])])
def test_the_first_tensor_of_what_a_layer_returns(result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Returns(32, 8)
    monkeypatch.setattr(Returns, "result", lambda y: y)
    expected = measure(layer, X).layers[0].sqnr
    monkeypatch.setattr(Returns, "result", result)
    assert measure(layer, X).layers[0].sqnr == expected
    monkeypatch.setattr(Returns, "result", lambda y: y.argmax(-1))
    with pytest.raises(ValueError, match="gives no floating-point tensor to compare: Tensor"):
        measure(layer, X)


def test_static_scales_saturate() -> None:
    """The scale lets values up to 464 / 448 of it be rounded to the largest."""
    layer, x = nn.Linear(32, 8), torch.full((4, 32), 0.5)
    x[0, :3], x[1, 0] = torch.tensor([1.03, 1.04, -5.0]), 1.0
    options = FP8GemmOptions(
        engine="reference", fp16_weight_storage="keep", scheme=Scheme(weight=ROW, activation=TENSOR, static=True)
    )
    convert(layer, "weight", options, input_scale=torch.full((1, 1), 1 / 448))
    row = measure(layer, x).layers[0]
    assert row.saturated == 2 / 128
    assert row.sqnr < 25
    assert (row.saturated_weights, row.outlier_channels) == (0.0, ())


def test_layers_are_measured_at_their_precision() -> None:
    model = enable_fp8_gemm(nn.Sequential(*(nn.Linear(32, 32) for _ in range(3))), options=KEPT)
    set_precision(model, "0", "original")
    set_precision(model, "1", "weight_only")
    rows = measure(model, X).layers
    assert rows[0].reason == "it runs on its original at present: call set_precision(model, pattern, 'fp8') first"
    assert [row.scheme for row in rows] == ["", "weight row, activation kept", "weight row, activation row"]


@pytest.mark.parametrize("search", ["scales", "rounding"])
def test_searched_weights(search: str) -> None:
    """A search by the inputs that are measured is at least as good as none, and the same as that of patching."""
    layer, x = nn.Linear(32, 32, bias=False), torch.randn(512, 32)
    options = FP8GemmOptions(weight_search=search, fp16_weight_storage="keep", scheme="tensor")
    plain = measure(layer, x, options=FP8GemmOptions(scheme="tensor")).output.sqnr
    found = measure(layer, x, options=options).output.sqnr
    patched = measure(enable_fp8_gemm(layer, options=options, calibration_inputs=x), x).output.sqnr
    assert found > plain
    assert patched == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("grid", [ROW, TENSOR])
def test_weights_beyond_their_scales(grid: Any) -> None:
    w = torch.ones(3, 2, 64)
    w[1, 1, :5], w[2, 0, 7] = 1.05, -2.0
    scale = torch.full(grid.scale_shape(w.shape), 1 / 448)
    assert saturated_weights(w, quantize(w, grid, scale=scale)) == 6 / 384
    assert saturated_weights(w[1], quantize(w[1], grid, scale=scale[1])) == 5 / 128
    assert saturated_weights(w, quantize(w, grid)) == 0


def test_inputs_that_products_contract_differently() -> None:
    tally = InputTally()
    assert (tally.outlier_channels, tally.outlier_tokens, tally.saturated_share) == (None, None, 0.0)
    tally.add(torch.zeros(3, 4), -1, None)
    assert (tally.outlier_channels, tally.outlier_tokens) == ((), 0)
    tally.add(torch.ones(5, 4), -2, None)
    assert tally.outlier_channels is None
