"""Scales with the least squared error, and error-compensated rounding: never worse than what they replace."""

from __future__ import annotations

import pytest
import torch

from fp8gemm import BLOCK_128, GROUP_128, MX, ROW, TENSOR, Granularity, ScaledTensor, dequantize, quantize
from fp8gemm.numerics import SCALE_FACTORS, SCALE_FLOOR, block_scale, expand_scale, nearest_value, search_scale
from fp8gemm.weights import compensation, quantization
from fp8gemm.weights.compensation import compensated
from fp8gemm.weights.quantization import quantize_weight, searched_scale

GRANULARITIES = [TENSOR, ROW, GROUP_128, BLOCK_128, MX, Granularity(2, 3), Granularity(None, 8)]
# The errors that are compared are sums of squares in float64 of float32 differences, which each round twice.
NOISE = 1 + 2.0**-20


def heavy(n: int, k: int) -> torch.Tensor:
    """Values with heavy tails, a row of zeros and a row of tiny values."""
    w = torch.distributions.StudentT(3.0).sample((n, k))
    w[1], w[2] = 0, w[2] * 1e-30
    return w


def errors(w: torch.Tensor, found: ScaledTensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The squared error of each block in float64, by definition."""
    off = (w.double() - dequantize(found).double()).nan_to_num(0.0).square()
    off = off if importance is None else off * importance.double()
    index = expand_scale(torch.arange(found.scale.numel()).view(found.scale.shape).double(), found.granularity, w.shape)
    return torch.zeros(found.scale.numel()).double().index_add(0, index.expand(w.shape).long().flatten(), off.flatten())


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_block_is_worse_than_with_the_scale_of_its_largest_value(granularity: Granularity, weighted: bool) -> None:
    w = heavy(150, 136)
    importance = torch.linspace(0, 3, 136).exp() if weighted else None
    scale = search_scale(w, granularity, importance=importance)
    ours = errors(w, quantize(w, granularity, scale=scale), importance)
    plain = errors(w, quantize(w, granularity), importance)
    assert (ours <= plain * NOISE).all()
    assert ours.sum() < plain.sum() * (0.97 if granularity in (ROW, GROUP_128, MX) else NOISE)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_scale_is_the_best_of_the_candidates(dtype: torch.dtype) -> None:
    w = torch.randn(16, 40)
    importance = torch.rand(40)
    candidates = [block_scale(w, ROW, dtype=dtype) * factor for factor in SCALE_FACTORS]
    each = torch.stack([errors(w, quantize(w, scale=scale, dtype=dtype), importance) for scale in candidates])
    found = quantize(w, scale=search_scale(w, ROW, dtype=dtype, importance=importance), dtype=dtype)
    assert (errors(w, found, importance) <= each.amin(0) * NOISE).all()
    assert len((found.scale / candidates[0]).unique()) > 3


def test_clipping_is_chosen_where_it_is_better() -> None:
    """An outlier in a channel that is never used, beside values that its scale would round to zero."""
    w = torch.full((1, 8), 1.0)
    w[0, 0] = 448 * 1.5 * 2.0**10  # 1 is less than half of the smallest step, and more with a smaller scale
    importance = torch.ones(8)
    importance[0] = 0
    scale = search_scale(w, ROW, importance=importance)
    assert dequantize(quantize(w, scale=scale))[0, 1:].unique().tolist() != [0]
    assert scale.item() < 1.5 * 2.0**10
    assert search_scale(w, ROW).item() == 1.5 * 2.0**10


def test_power_of_two_scales_stay_powers_of_two() -> None:
    w = heavy(64, 96)
    scale = search_scale(w, MX, scale_format="ue8m0")
    assert scale.log2().frac().eq(0).all()
    factor = scale / block_scale(w, MX, scale_format="ue8m0")
    assert set(factor.unique().tolist()) <= {0.5, 1.0}
    assert searched_scale(w, MX, scale_format="ue8m0").equal(scale)


def test_what_is_not_finite_or_zero_is_as_in_quantize() -> None:
    w = torch.randn(5, 32)
    finite = search_scale(w, ROW)
    w[0, 3], w[1, 5], w[2], w[3] = torch.nan, torch.inf, torch.nan, 0
    scale = search_scale(w, ROW)
    assert scale[4] == finite[4]
    assert scale[2] == scale[3] == SCALE_FLOOR
    found = quantize(w, scale=scale)
    assert found.data.float().isnan().equal(~w.isfinite())
    w[0, 3], w[1, 5] = 0, 0
    assert search_scale(w, ROW)[:2].equal(scale[:2])
    assert search_scale(torch.zeros(0, 8), ROW).shape == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nearest_value_is_the_cast(dtype: torch.dtype) -> None:
    """On every bfloat16 in the range, which include all ties, and on numbers of more bits."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = torch.cat([every[every.isfinite()], torch.randn(10_000) * 100, torch.randn(10_000) * 1e-3])
    x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    assert nearest_value(x, dtype).equal(x.to(dtype).float())


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_in_parts_the_scales_are_the_same(granularity: Granularity, monkeypatch: pytest.MonkeyPatch) -> None:
    w, importance = torch.randint(-8, 9, (150, 70)).float(), torch.randint(0, 4, (70,)).float()
    monkeypatch.setattr(quantization, "_SEARCH_ELEMENTS", 1000)
    monkeypatch.setattr(quantization, "_PART_ELEMENTS", 1000)
    scale = searched_scale(w, granularity, importance=importance)
    assert scale.equal(search_scale(w, granularity, importance=importance))
    found, expected = quantize_weight(w, granularity, scale=scale), quantize(w, granularity, scale=scale)
    assert found.scale.equal(expected.scale)
    assert found.data.float().equal(expected.data.float())


def tokens(count: int, k: int) -> torch.Tensor:
    """Activations of a distribution with few directions, as those of trained models have."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(k // 4, k, generator=generator)
    return torch.randn(count, k // 4) @ mix + 0.1 * torch.randn(count, k)


def output_errors(w: torch.Tensor, found: ScaledTensor, x: torch.Tensor) -> torch.Tensor:
    """The squared error of each output, in float64."""
    return (x.double() @ (dequantize(found).double() - w.double()).t()).square().sum(0)


@pytest.mark.parametrize("granularity", [TENSOR, ROW, GROUP_128, BLOCK_128, MX, Granularity(2, 3)], ids=str)
def test_compensated_rounding_is_never_worse_and_generalizes(
    granularity: Granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compensation, "_PART_ELEMENTS", 5000)
    w, x, held_out = torch.randn(150, 160), tokens(600, 160), tokens(300, 160)
    plain = quantize_weight(w, granularity)
    found = compensated(w, plain.scale, plain, x.t() @ x)
    assert found.weight.granularity == granularity
    rows, _ = granularity.block(w.shape)
    for place in range(0, 150, rows):  # each group of rows by itself
        ours, theirs = (output_errors(w, weight, x)[place : place + rows].sum() for weight in (found.weight, plain))
        assert ours <= theirs * (1 + 1e-3)  # the gram matrix is summed in float32
    assert output_errors(w, found.weight, held_out).sum() < 0.3 * output_errors(w, plain, held_out).sum()


def test_compensated_rounding_is_plain_where_nothing_can_be_pushed_on() -> None:
    """Independent inputs of equal size, and values that FP8 has: no error, and none to compensate."""
    w = torch.randint(-8, 9, (6, 32)).float()
    w[:, 0] = 448
    plain = quantize_weight(w, ROW)
    found = compensated(w, plain.scale, plain, torch.eye(32))
    assert (found.plain, found.groups) == (6, 6)
    assert found.weight.data.float().equal(w)


@pytest.mark.parametrize("shape", [(128, 128), (100, 160), (1, 128), (3, 1), (128, 300)])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_compensated_rounding_of_few_blocks(granularity: Granularity, shape: tuple[int, int]) -> None:
    """One block of rows, of columns, or of both."""
    w, x = torch.randn(shape), torch.randn(200, shape[1])
    plain = quantize_weight(w, granularity)
    found = compensated(w, plain.scale, plain, x.t() @ x)
    assert found.groups == plain.scale.shape[0]
    assert output_errors(w, found.weight, x).sum() <= output_errors(w, plain, x).sum() * (1 + 1e-3)


def test_compensated_rounding_of_what_is_not_finite() -> None:
    w, x = torch.randn(4, 64), tokens(100, 64)
    plain = quantize_weight(w, ROW)
    alone = compensated(w, plain.scale, plain, x.t() @ x).weight
    broken = w.clone()
    broken[1, 7], broken[2] = torch.nan, torch.inf
    broken[3] = 0
    nearest = quantize_weight(broken, ROW)
    found = compensated(broken, nearest.scale, nearest, x.t() @ x).weight
    assert found.data.float().isnan().equal(~broken.isfinite())
    assert found.data[0].float().equal(alone.data[0].float())
    assert found.data[3].float().eq(0).all()


@pytest.mark.parametrize("gram", [torch.zeros(64, 64), torch.ones(64, 64) * 1e30, torch.diag(torch.arange(64.0))])
def test_inputs_without_all_directions(gram: torch.Tensor) -> None:
    """No tokens, one direction only, and a channel that is never used."""
    w = torch.randn(8, 64)
    plain = quantize_weight(w, ROW)
    found = compensated(w, plain.scale, plain, gram)
    assert dequantize(found.weight).isfinite().all()
    off = dequantize(found.weight) - w
    assert (off @ gram * off).sum() <= ((dequantize(plain) - w) @ gram * (dequantize(plain) - w)).sum() * (1 + 1e-3)
