"""Codes, scales and rounding, compared with independent definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8gemm import (
    BLOCK_128,
    GROUP_128,
    MX,
    ROW,
    TENSOR,
    Granularity,
    ScaledTensor,
    Scheme,
    dequantize,
    quantize,
)
from fp8gemm.numerics import (
    SCALE_FLOOR,
    block_scale,
    decode_ue8m0,
    encode_ue8m0,
    expand_scale,
    nan_rows,
    round_up_to_power_of_two,
)
from fp8gemm.weights import quantization
from fp8gemm.weights.quantization import quantize_weight

GRANULARITIES = [TENSOR, ROW, GROUP_128, BLOCK_128, MX, Granularity(2, 3)]
FORMATS = {torch.float8_e4m3fn: (4, 3, 7), torch.float8_e5m2: (5, 2, 15)}  # exponent bits, mantissa bits, bias


def decoded(code: int, dtype: torch.dtype) -> float:
    """A code's value from the definition of its format (OCP 8-bit floating point, section 5)."""
    exponent_bits, mantissa_bits, bias = FORMATS[dtype]
    sign = -1.0 if code & 0x80 else 1.0
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = code & (2**mantissa_bits - 1)
    if dtype == torch.float8_e4m3fn and code & 0x7F == 0x7F:
        return math.nan
    if dtype == torch.float8_e5m2 and exponent == 31:
        return sign * math.inf if mantissa == 0 else math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_all_codes_decode_exactly(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(dtype)
    found = dequantize(ScaledTensor(codes, torch.ones(1, 1), ROW))[0]
    expected = torch.tensor([decoded(code, dtype) for code in range(256)])
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(5, 7), (130, 257), (1, 1), (3, 64, 40)])
def test_dequantize_is_the_equation(granularity: Granularity, shape: tuple[int, ...]) -> None:
    scaled = quantize(torch.randn(shape), granularity)
    rows, cols = granularity.block(shape)
    n, k = shape[-2:]
    i, j = torch.arange(n)[:, None] // rows, torch.arange(k)[None, :] // cols
    assert torch.equal(dequantize(scaled), scaled.data.float() * scaled.scale[..., i, j])


@pytest.mark.parametrize("dtype", list(FORMATS))
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_error_is_within_half_an_ulp(granularity: Granularity, dtype: torch.dtype) -> None:
    x = torch.randn(130, 260) * torch.logspace(-6, 6, 130)[:, None]
    scaled = quantize(x, granularity, dtype=dtype)
    scale = expand_scale(scaled.scale, granularity, x.shape)
    _, mantissa_bits, bias = FORMATS[dtype]
    value = (x / scale).abs().double()
    exponent = value.clamp(min=2.0 ** (1 - bias)).log2().floor()
    half_ulp = 2.0 ** (exponent - mantissa_bits) / 2
    assert ((scaled.data.double() - (x / scale).double()).abs() <= half_ulp).all()


def test_ties_go_to_even() -> None:
    # Between 16 and 18 (codes ...000 and ...001) and between 18 and 20 (...001 and ...010), scale 1.
    x = torch.tensor([[448.0, 17.0, 19.0, -17.0, -19.0, 2.0**-10, 3 * 2.0**-10]])
    assert quantize(x).data.float().tolist() == [[448.0, 16.0, 20.0, -16.0, -20.0, 0.0, 2.0**-8]]


def test_zeros_stay_exact_zeros() -> None:
    for granularity in GRANULARITIES:
        scaled = quantize(torch.zeros(3, 200), granularity)
        assert torch.equal(dequantize(scaled), torch.zeros(3, 200))
        assert (scaled.scale == SCALE_FLOOR).all()


def test_smallest_and_largest_floats_survive() -> None:
    for amax in (1e-40, 2.0**-126, 1e-30, 3.4e38):
        scaled = quantize(torch.tensor([[amax, -amax / 2]]))
        assert torch.isfinite(scaled.scale).all()
        back = dequantize(scaled)
        assert torch.allclose(back, torch.tensor([[amax, -amax / 2]]), rtol=2**-4, atol=2.0**-126 * 2**-10)


def test_what_is_not_finite_becomes_nan_and_hurts_no_other() -> None:
    x = torch.tensor([[1.0, math.nan, -2.0], [math.inf, 3.0, -math.inf]])
    for granularity in (TENSOR, ROW):
        found = dequantize(quantize(x, granularity))
        assert found.isnan().tolist() == [[False, True, False], [True, False, True]]
        assert torch.allclose(found[[0, 0, 1], [0, 2, 1]], torch.tensor([1.0, -2.0, 3.0]), rtol=2**-4)


def test_static_scale_saturates() -> None:
    x = torch.tensor([[1000.0, -3.0]])
    assert quantize(x, TENSOR, scale=torch.tensor(1.0)).data.float().tolist() == [[448.0, -3.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrow_and_wide_input_is_quantized_as_float32(dtype: torch.dtype) -> None:
    x = torch.randn(9, 33).to(dtype)
    a, b = quantize(x), quantize(x.float())
    assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
    assert torch.equal(a.scale, b.scale)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(GRANULARITIES),
    st.sampled_from(["float32", "ue8m0"]),
    st.integers(-30, 30),
)
def test_quantize_properties(n: int, k: int, granularity: Granularity, scale_format: str, exponent: int) -> None:
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(n * 1000 + k)) * 2.0**exponent
    scaled = quantize(x, granularity, scale_format=scale_format)  # type: ignore[arg-type]
    assert tuple(scaled.scale.shape) == granularity.scale_shape(x.shape)
    assert scaled.data.float().isfinite().all()
    back = dequantize(scaled)
    # Quantizing again with the same scales changes nothing.
    again = quantize(back, granularity, scale=scaled.scale)
    assert torch.equal(dequantize(again), back)
    # Nothing saturates, and half an ulp of the largest binade bounds every error.
    limit = expand_scale(scaled.scale, granularity, x.shape) * 16
    assert ((back - x).abs() <= limit * (1 + 1e-6)).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 200), st.integers(1, 200), st.sampled_from(GRANULARITIES))
def test_weights_in_parts_are_bitwise_the_same(n: int, k: int, granularity: Granularity) -> None:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    a, b = quantize(w, granularity), quantize_weight(w, granularity)
    assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
    assert torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("compiled", [True, False])
def test_large_weights_in_parts(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without compiled kernels: the largest element may be in any part."""
    monkeypatch.setattr(quantization, "_PART_ELEMENTS", 1000)
    if not compiled:
        monkeypatch.setattr(quantization, "_compiled", lambda *weight: None)
    for granularity, largest in itertools.product(GRANULARITIES, (0, 150, 299)):
        w = torch.randn(300, 70)
        w[largest, 3] = 100
        a, b = quantize(w, granularity), quantize_weight(w, granularity)
        assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
        assert torch.equal(a.scale, b.scale)


def test_power_of_two_scales_round_up() -> None:
    values = torch.tensor([1.0, 1.0000001, 1.5, 2.0, 3.0, 2.0**-126, 5e-5])
    rounded = round_up_to_power_of_two(values)
    expected = torch.tensor([2.0 ** math.ceil(math.log2(value)) for value in values.tolist()])
    assert torch.equal(rounded, expected)
    scale = block_scale(torch.randn(70, 100), MX, scale_format="ue8m0")
    assert torch.equal(decode_ue8m0(encode_ue8m0(scale)), scale)


def test_ue8m0_bytes() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor([2.0 ** (b - 127) for b in range(255)])
    assert torch.equal(decode_ue8m0(byte)[:255], expected)
    assert decode_ue8m0(byte)[255].isnan()
    assert torch.equal(decode_ue8m0(byte.view(torch.float8_e8m0fnu))[:255], expected)
    assert torch.equal(encode_ue8m0(expected), byte[:255])
    for wrong in (0.0, 3.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="powers of two"):
            encode_ue8m0(torch.tensor([wrong]))


def test_nan_rows() -> None:
    for dtype in FORMATS:
        data = torch.ones(4, 5).to(dtype)
        data[2, 4] = math.nan
        assert nan_rows(data).tolist() == [False, False, True, False]


def test_scaled_tensor_refuses_what_contradicts_its_equation() -> None:
    data = torch.zeros(4, 6).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"granularity row .* shape \(4, 6\) have shape \(4, 1\), found \(6, 1\)"):
        ScaledTensor(data, torch.ones(6, 1), ROW)
    with pytest.raises(ValueError, match=r"float8_e4m3fn, torch\.float8_e5m2, found torch\.float32"):
        ScaledTensor(data.float(), torch.ones(4, 1), ROW)
    with pytest.raises(ValueError, match=r"scale must be torch\.float32, found torch\.bfloat16"):
        ScaledTensor(data, torch.ones(4, 1).bfloat16(), ROW)
    with pytest.raises(ValueError, match="2 dimensions"):
        ScaledTensor(data[0], torch.ones(1), ROW)
    with pytest.raises(ValueError, match=r"None or at least 1, found 0"):
        Granularity(0, None)


def test_data_and_scale_are_on_one_device() -> None:
    data = torch.zeros(4, 8).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="data is on cpu but scale is on meta"):
        ScaledTensor(data, torch.ones(4, 1, device="meta"), ROW)


def test_weight_only_schemes_have_nothing_static() -> None:
    static = Scheme(weight=TENSOR, activation=TENSOR, static=True, scale_format="ue8m0")
    assert static.weight_only() == Scheme(weight=TENSOR, activation=None, scale_format="ue8m0")
