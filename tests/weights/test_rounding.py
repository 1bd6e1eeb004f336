"""Small changes to an FP8 weight: how much of them survives rounding, and the warning if it is little."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fp8gemm import FP8GemmOptions, FP8Linear, Granularity, Scheme
from fp8gemm.numerics import dequantize
from fp8gemm.weights import FP8Weight, convert, rounding


@pytest.fixture(autouse=True)
def _not_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_warned", set())


def layer(**options: Any) -> FP8Linear:
    linear = nn.Linear(128, 256, dtype=torch.float32)
    return FP8Linear.convert(linear, FP8GemmOptions(**options))


def small_change(weight: torch.Tensor) -> torch.Tensor:
    """A delta with 0.3 % of the weight's norm."""
    delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float32)
    return delta * (0.003 * weight.dequantize().norm() / delta.norm())


def kept(made: FP8Linear, was: torch.Tensor, delta: torch.Tensor) -> float:
    """The share of the delta that survives rounding."""
    found = dequantize(made.scaled()) - was
    return float((found * delta).sum() / (delta * delta).sum())


TILES = Scheme(weight=Granularity(64, 32), activation=None)


@pytest.mark.parametrize("scheme", ["row", "tensor", TILES], ids=str)
def test_small_changes(scheme: Any) -> None:
    """Rounding to nearest loses most of them, stochastic rounding keeps them on average, and ``keep`` keeps them all.

    Over 32768 values, the share that stochastic rounding keeps has a standard deviation of about 0.04.
    """
    shares = {}
    for name, options in {
        "nearest": {},
        "stochastic": {"rounding": "stochastic", "generator": torch.Generator().manual_seed(1001)},
        "keep": {"fp16_weight_storage": "keep"},
    }.items():
        made = layer(scheme=scheme, **options)
        was = made.weight.dequantize() if name != "keep" else made.original_weight.detach().clone()
        delta = small_change(made.weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.no_grad():
                made.weight.add_(delta)
            shares[name] = kept(made, was, delta)
        if name == "keep":
            torch.testing.assert_close(made.original_weight.detach(), was + delta)
    assert shares["nearest"] < 0.5
    assert 0.85 < shares["stochastic"] < 1.15


def test_stochastic_rounding_is_unbiased() -> None:
    """On average over 20 merges nothing is lost, without a warning; the same generator gives the same bytes."""
    shares = []
    for seed in range(20):
        made = layer(rounding="stochastic", generator=torch.Generator().manual_seed(1000 + seed))
        was, delta = made.weight.dequantize(), small_change(made.weight)
        made.weight.data += delta
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            shares.append(kept(made, was, delta))
    assert 0.95 < sum(shares) / len(shares) < 1.05
    data = []
    for _ in range(2):
        torch.manual_seed(0)
        made = layer(rounding="stochastic", generator=torch.Generator().manual_seed(1003))
        made.weight.data += small_change(made.weight)
        data.append(made.scaled().data.view(torch.uint8))
    assert data[0].equal(data[1])


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
@pytest.mark.parametrize("experts", [0, 3])
def test_only_what_changed_is_rounded(how: Any, experts: int) -> None:
    owner = nn.Module()
    shape = (experts, 64, 96) if experts else (64, 96)
    owner.weight = nn.Parameter(torch.randn(shape, dtype=torch.float32))
    scheme = Scheme(weight=Granularity(16, 32), activation=None)
    weight = convert(owner, "weight", FP8GemmOptions(scheme=scheme, rounding=how))
    before = weight.scaled()
    matrix = weight[1] if experts else weight
    matrix[20:22, 40:50] += 0.37
    after = weight.scaled()
    changed = (before.data.view(torch.uint8) != after.data.view(torch.uint8)).nonzero()
    assert len(changed) > 0
    assert not experts or set(changed[:, 0].tolist()) == {1}
    assert set((changed[:, -2] // 16).tolist()) == {1}
    assert set((changed[:, -1] // 32).tolist()) == {1}
    assert (before.scale != after.scale).sum() <= 1
    weight.copy_(weight.dequantize())  # a copy of the same values
    assert weight.scaled().data.view(torch.uint8).equal(after.data.view(torch.uint8))


def test_a_lost_change_warns_once_with_the_figure() -> None:
    made, other = layer(), layer()
    made.weight.data += small_change(made.weight)
    with pytest.warns(
        UserWarning, match=r"^\d\d% of what was just written to an FP8 weight \[256, 128\] was lost"
    ) as told:
        made.scaled()
    assert len(told) == 1
    text = str(told[0].message)
    for way_out in ("fp16_weight_storage='keep'", "rounding='stochastic'", "disable_fp8_gemm(model) before"):
        assert way_out in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.weight.data += small_change(other.weight)
        other.scaled()


def test_what_is_not_lost_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for write in (
            lambda w: w.zero_(),
            lambda w: w.mul_(0.5),
            lambda w: nn.init.trunc_normal_(w),
            lambda w: w.copy_(torch.randn(256, 128, dtype=torch.float32)),
            lambda w: w[3].fill_(float("nan")),
            lambda w: w.copy_(w.dequantize()),
        ):
            made = layer()
            with torch.no_grad():
                write(made.weight)
            made.scaled()
            assert isinstance(made.weight, FP8Weight)
