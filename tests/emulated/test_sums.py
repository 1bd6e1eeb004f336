"""How the tensor cores of an H100 and an RTX 4060 add FP8 products, emulated by mmaemu, and what the sums lose."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import conformance
import mmaemu
import pytest
import torch
from bench.scripts import BENCHMARKS, load
from mmaemu.model.chain import chain_gemm

from fp8gemm import SCHEMES, MatmulSpec, ScaledTensor, quantize
from fp8gemm.engines.base import FAST_UP_TO_K
from fp8gemm.engines.reference import ReferenceEngine

accumulation = load("accumulation")
CARDS = pytest.mark.parametrize("profile", accumulation.CARDS.values(), ids=accumulation.CARDS)
PROMOTION = 128  # products after which "precise" adds in float32
SAVED = json.loads((BENCHMARKS / "results/accumulation_emulated.json").read_text())["rows"]


def sums(x: torch.Tensor, w: torch.Tensor, profile: str, *, fast: bool) -> torch.Tensor:
    """The card's float32 sums ``[M, N]`` of codes ``x [M, K]`` and ``w [N, K]``."""
    return mmaemu.accumulate(x, w, use_fast_accum=fast, profile=profile)


def promoted(x: torch.Tensor, w: torch.Tensor, profile: str, together: int) -> torch.Tensor:
    """``total += dot(x, w)`` in float32, as Triton's row kernel does: each dot leaves ``together`` products in the
    tensor core's accumulator."""
    total = torch.zeros(x.shape[0], w.shape[0])
    for start in range(0, x.shape[1], together):
        part = slice(start, start + together)
        total += sums(x[:, part], w[:, part], profile, fast=True)
    return total


def kept_bits(profile: str, *, fast: bool, distance: int) -> int:
    """The significant bits of a sum: the most with which ``2**e + 1 - 2**e`` is still 1.

    These products are ``distance`` apart along K.
    """
    x, w = torch.zeros(2, 1, 3 * distance)
    x[0, distance], w[0, distance] = 2.0**-8, 2.0**-8
    for exponent in range(32):  # 2 ** (exponent - 16) as a product of two codes, each between 2 ** -8 and 2 ** 8
        half = exponent // 2
        x[0, 0], x[0, 2 * distance] = 2.0 ** (half - 8), -(2.0 ** (half - 8))
        w[0, 0] = w[0, 2 * distance] = 2.0 ** (exponent - half - 8)
        codes = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        if sums(*codes, profile, fast=fast) != 2.0**-16:
            return exponent
    raise AssertionError("no limit was found")


@CARDS
@pytest.mark.parametrize("distance", [1, 128])
def test_fast_sums_keep_14_bits(profile: str, distance: int) -> None:
    """Ada's like Hopper's, among products that are added at once and in the accumulator."""
    assert kept_bits(profile, fast=True, distance=distance) == 14


@CARDS
def test_precise_sums_keep_those_of_float32(profile: str) -> None:
    assert kept_bits(profile, fast=False, distance=PROMOTION) == 24
    assert kept_bits(profile, fast=False, distance=1) == 14


class Accumulator(ReferenceEngine):
    """Products with the sums of a card."""

    def __init__(self, profile: str, *, together: int | None = None) -> None:
        self.profile, self.together = profile, together

    def linear(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
        assert bias is None
        xq = quantize(x, weight.scheme.activation)
        w = ScaledTensor(weight.data, weight.scale, weight.scheme.weight)
        if self.together is None:
            total = sums(xq.data, w.data, self.profile, fast=True)
        else:
            total = promoted(xq.data, w.data, self.profile, self.together)
        return (total * xq.scale * w.scale.t()).to(out_dtype)


@CARDS
@pytest.mark.parametrize("name", ["row", "tensor"])
def test_wide_accumulation_needs_no_more_than_fast_sums_keep(profile: str, name: str) -> None:
    spec = MatmulSpec(scheme=SCHEMES[name], n=16, k=4096)
    conformance.wide_accumulation(Accumulator(profile), spec, torch.device("cpu"))
    conformance.wide_accumulation(Accumulator(profile, together=PROMOTION), spec, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore::mmaemu.ExperimentalPresetWarning")
@pytest.mark.parametrize("bits", [12, 13])
def test_wide_accumulation_needs_13_bits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper whose sums kept 13 bits would pass as well; one with 12 would not."""
    preset = replace(
        mmaemu.get_preset("hopper"), name=f"{bits} bits", frac=bits - 1, frac_out=bits - 1, maturity="custom"
    )

    def narrow(x: torch.Tensor, w: torch.Tensor, profile: str, *, fast: bool) -> torch.Tensor:
        codes = x.view(torch.uint8), w.view(torch.uint8)
        return chain_gemm(*codes, fmt_a="e4m3", fmt_b="e4m3", preset=preset)

    monkeypatch.setitem(globals(), "sums", narrow)
    spec = MatmulSpec(scheme=SCHEMES["row"], n=16, k=4096)
    passes = nullcontext() if bits == 13 else pytest.raises(AssertionError, match="partial sums were rounded")
    with passes:
        conformance.wide_accumulation(Accumulator("hopper-ws0"), spec, torch.device("cpu"))


@CARDS
@pytest.mark.parametrize("together", [32, 64, PROMOTION])
def test_dots_added_in_float32_are_precise(profile: str, together: int) -> None:
    """Those of 128 products bit for bit as cuBLASLt's precise sums; shorter ones no worse than them."""
    x, w = accumulation.operands("language model", 2048)
    x, w = quantize(x[12:20], SCHEMES["row"].activation).data, quantize(w[:16], SCHEMES["row"].weight).data
    exact = x.double() @ w.double().t()
    precise, found = sums(x, w, profile, fast=False), promoted(x, w, profile, together)
    if together == PROMOTION:
        assert found.equal(precise)
    assert (found - exact).norm() <= 1.05 * (precise - exact).norm()
    assert (found - exact).norm() < (sums(x, w, profile, fast=True) - exact).norm() / 3


@pytest.mark.parametrize("k", [512, FAST_UP_TO_K])
@pytest.mark.parametrize("kind", accumulation.OPERANDS)
def test_saved_errors_are_what_is_found(kind: str, k: int) -> None:
    """benchmarks/results/accumulation_emulated.json, from which the table in the docs and the constant come."""
    saved = [row for row in SAVED if (row["operands"], row["K"]) == (kind, k)]
    for row, found in zip(saved, accumulation.measure(kind, k), strict=True):
        figures = {name for name, value in found.items() if isinstance(value, float)}
        assert {name: row[name] for name in row.keys() - figures} == {
            name: found[name] for name in row.keys() - figures
        }
        assert {name: found[name] for name in figures} == pytest.approx({name: row[name] for name in figures}, rel=0.05)
