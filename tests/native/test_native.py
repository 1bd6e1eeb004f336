"""The compiled CPU kernels: exact where arithmetic is, within their buffers, in any number of threads and processes."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8gemm import BLOCK_128, GROUP_128, MX, ROW, TENSOR, Granularity, dequantize, native, quantize
from fp8gemm.native.library import _problem
from fp8gemm.numerics import expand_scale

FOUND = native.find()
pytestmark = pytest.mark.skipif(
    isinstance(FOUND, native.Unavailable), reason=getattr(FOUND, "reason", "the native library was found")
)
PATHS = [] if isinstance(FOUND, native.Unavailable) else list(FOUND.levels[: FOUND.level + 1])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Two that do not match the tiles, and one that is neither a divisor of 32 nor divisible into whole blocks.
GRANULARITIES = [TENSOR, ROW, GROUP_128, BLOCK_128, MX, Granularity(3, 50), Granularity(7, 96)]


@pytest.fixture(params=PATHS)
def library(request: pytest.FixtureRequest) -> native.Library:
    assert isinstance(FOUND, native.Library)
    return FOUND.lowered(request.param)


@pytest.fixture
def threads():
    """Sets the number of threads, and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def exact_weight(n: int, k: int, granularity: Granularity, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Small integers as FP8 data, powers of two times `factor` as scales."""
    data = torch.randint(-4, 5, (n, k)).float().to(torch.float8_e4m3fn)
    scale = torch.exp2(torch.randint(-2, 3, granularity.scale_shape((n, k))).float())
    return data, scale * factor


def linear(library, x, data, scale, granularity, bias=None, out_dtype=None):
    out = torch.full((x.shape[0], data.shape[0]), torch.nan, dtype=out_dtype or x.dtype)
    library.linear(x, data, scale, *granularity.block(data.shape), bias, out, nans=library.has_nans(data))
    return out


def product(x, data, scale, granularity, bias=None) -> torch.Tensor:
    """The same product in float64."""
    w = data.double() * expand_scale(scale, granularity, data.shape).double()
    y = x.double() @ w.t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_operands_give_the_exact_product(library, dtype, granularity):
    torch.manual_seed(0)
    shapes = [(1, 1), (1, 7), (17, 33), (32, 64), (40, 130), (40, 131), (130, 257), (70, 300)]
    # Power-of-two scales may be folded into the weights; other scales multiply sums.
    for (n, k), (with_bias, factor) in zip(shapes, itertools.cycle([(False, 1.0), (True, 3.0)]), strict=False):
        data, scale = exact_weight(n, k, granularity, factor)
        bias = torch.randint(-3, 4, (n,)).to(dtype) if with_bias else None
        for m in (0, 1, 2, 3, 5, 6, 16, 17, 33, 90):
            x = torch.randint(-2, 3, (m, k + 3)).to(dtype)[:, 1 : k + 1]
            y = linear(library, x, data, scale, granularity, bias)
            assert y.equal(product(x, data, scale, granularity, bias).to(dtype)), f"M={m}, N={n}, K={k}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_tokens(library, dtype):
    torch.manual_seed(1)
    data, scale = exact_weight(35, 100, ROW)
    bias = torch.randint(-3, 4, (35,)).float()
    x = torch.randint(-2, 3, (1100, 100)).to(dtype)
    expected = product(x, data, scale, ROW, bias).to(dtype)
    for m in (*range(71), 511, 513, 1025, 1100):
        assert linear(library, x[:m], data, scale, ROW, bias).equal(expected[:m]), f"M={m}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tail(library, dtype):
    torch.manual_seed(2)
    for n, k in [*((n, 70) for n in range(1, 67)), *((5, k) for k in (*range(1, 131), 511, 513, 600))]:
        data, scale = exact_weight(n, k, ROW)
        for m in (1, 3):
            x = torch.randint(-2, 3, (m, k)).to(dtype)
            assert linear(library, x, data, scale, ROW).equal(product(x, data, scale, ROW).to(dtype)), f"{m} {n} {k}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", [ROW, BLOCK_128, MX, Granularity(40, 300), Granularity(1, 27)], ids=str)
def test_k_of_several_chunks(library, dtype, granularity):
    torch.manual_seed(10)
    for k in (1023, 1024, 1025, 2048, 2600):
        data, scale = exact_weight(70, k, granularity)
        x = torch.randint(-2, 3, (300, k)).to(dtype)
        expected = product(x, data, scale, granularity)
        for m in (1, 7, 9, 13, 257, 300):
            y = linear(library, x[:m], data, scale, granularity, out_dtype=torch.float32)
            assert y.double().equal(expected[:m]), f"M={m}, K={k}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [96, 384, 1000])
def test_it_makes_no_difference_where_tokens_lie(library, dtype, k):
    """Rows that are far apart are copied; close ones are multiplied where they lie."""
    torch.manual_seed(11)
    weight = quantize(torch.randn(100, k), ROW)
    apart = torch.randn(300, 4096 // dtype.itemsize).to(dtype)[:, :k]
    close = torch.empty(300, k + 8, dtype=dtype)[:, 3 : k + 3].copy_(apart)
    for m in (1, 7, 13, 70, 300):
        expected = linear(library, apart[:m].contiguous(), weight.data, weight.scale, ROW)
        for x in (apart[:m], close[:m]):
            y = linear(library, x, weight.data, weight.scale, ROW)
            assert y.equal(expected), f"M={m}, strides {x.stride()}"


def test_no_elements_along_k_leave_the_bias(library):
    data, scale = torch.empty(5, 0, dtype=torch.float8_e4m3fn), torch.ones(5, 1)
    x, bias = torch.empty(3, 0, dtype=torch.bfloat16), torch.arange(5.0)
    assert linear(library, x, data, scale, ROW, bias).equal(bias.bfloat16().expand(3, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", [ROW, MX], ids=str)
@pytest.mark.parametrize("m", [1, 2, 17])
def test_all_256_codes_are_decoded_exactly(library, dtype, m, granularity):
    """A one among zeros selects one column of the weight: each code at each of 64 positions."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    data = torch.stack([codes.view(torch.uint8).roll(i) for i in range(64)], 1).view(torch.float8_e4m3fn).contiguous()
    finite = ~data.float().isnan().any(dim=1)
    scale = torch.full(granularity.scale_shape((256, 64)), 2.0**-20)
    clean = torch.where(finite[:, None], data.view(torch.uint8), 0).view(data.dtype)
    for start in range(0, 64, m):
        x = torch.zeros(m, 64)
        for t in range(m):
            x[t, (start + t) % 64] = 1
        y = linear(library, x.to(dtype), data, scale, granularity, out_dtype=torch.float32)
        assert y[:, finite].double().equal(product(x, clean, scale, granularity)[:, finite])
        assert y[:, ~finite].isnan().all()


def test_nans_are_found_wherever_they_are(library):
    data = torch.zeros(2, 9, 70, dtype=torch.uint8)[:, :, 1:66]
    data[:] = 0x7E
    assert not library.has_nans(data.view(torch.float8_e4m3fn))
    for expert, row, column in itertools.product((0, 1), (0, 8), (0, 31, 64)):
        for code in (0x7F, 0xFF):
            data[expert, row, column] = code
            assert library.has_nans(data.view(torch.float8_e4m3fn))
            assert library.has_nans(data[expert].view(torch.float8_e4m3fn))
            assert not library.has_nans(data[1 - expert].view(torch.float8_e4m3fn))
            data[expert, row, column] = 0xFE
    assert not library.has_nans(torch.empty(0, 8, dtype=torch.float8_e4m3fn))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", [ROW, MX, BLOCK_128], ids=str)
def test_looking_for_nans_changes_no_bit(library, dtype, granularity):
    torch.manual_seed(9)
    weight = quantize(torch.randn(70, 1300), granularity)
    for m in (1, 4, 8, 9, 40):
        x, outs = torch.randn(m, 1300).to(dtype), (torch.empty(m, 70), torch.empty(m, 70))
        for nans, out in zip((False, True), outs, strict=True):
            block = granularity.block(weight.shape)
            library.linear(x, weight.data, weight.scale, *block, None, out, nans=nans)
        assert outs[0].equal(outs[1])


def test_scales_too_far_out_to_be_folded(library):
    """Powers of two at which a weight would exceed bf16's normal numbers, though the product is fine in float32."""
    data = torch.tensor([0x01, 0x7E, 0x38, 0x81], dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(16, 16)
    for exponent, factor in ((-124, 2.0**100), (-118, 2.0**90), (119, 2.0**-60), (126, 2.0**-100)):
        scale = torch.full((16, 2), 2.0**exponent)
        x = torch.zeros(6, 64)
        x[range(6), range(6)] = factor
        assert linear(library, x, data, scale, MX).double().equal(product(x, data, scale, MX))


@pytest.mark.parametrize("m", [1, 3, 8, 20])
def test_scales_that_would_lift_tokens_out_of_range(library, m):
    """Tokens times a block's scale would overflow, or lose bits below fp32's normal numbers; the product does not."""
    for exponent, code, size in ((126, 2.0**-9, 2.0**-110), (100, 2.0**-9, 2.0**20), (-92, 256.0, 2.0**-60)):
        data = torch.full((160, 256), code).to(torch.float8_e4m3fn)
        scale = torch.tensor([[1.0, 1.0], [2.0**exponent] * 2])  # of rows up to 128, and of the others
        x = torch.full((m, 256), size * (1 + 2.0**-7))
        assert linear(library, x, data, scale, BLOCK_128).double().equal(product(x, data, scale, BLOCK_128))


@pytest.mark.parametrize("granularity", [MX, BLOCK_128], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_token(library, dtype, granularity):
    torch.manual_seed(3)
    data, scale = exact_weight(150, 300, granularity)
    data = torch.ones(150, 300).to(data.dtype)
    for m in (2, 5, 20):
        x = torch.ones(m, 300, dtype=dtype)
        x[0, 3], x[1, 64] = torch.nan, torch.inf
        y = linear(library, x, data, scale, granularity)
        assert y[0].isnan().all()
        assert y[1].eq(torch.inf).all()
        assert y[2:].equal(product(x[2:], data, scale, granularity).to(dtype))


def test_no_nan_rounds_to_a_number(library):
    """The NaN with all bits set would carry over into minus zero."""
    data, scale = exact_weight(20, 100, ROW)
    bias = torch.full((20,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    bias[10:] = torch.full((10,), -1, dtype=torch.int32).view(torch.float32)
    for dtype, m in itertools.product(DTYPES, (1, 2, 20)):
        assert linear(library, torch.ones(m, 100, dtype=dtype), data, scale, ROW, bias).isnan().all()


@pytest.mark.parametrize("granularity", [ROW, BLOCK_128, MX], ids=str)
@pytest.mark.parametrize(("dtype", "out_dtype"), [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32,) * 2])
def test_random_operands_are_as_accurate_as_float32(library, dtype, out_dtype, granularity):
    """Summing K products in fp32 errs by at most K units of 2**-24 of the sum of magnitudes; then one rounding."""
    torch.manual_seed(4)
    n, k = 70, 700
    weight = quantize(torch.randn(n, k), granularity)
    for m in (1, 4, 40):
        x = torch.randn(m, k).to(dtype)
        y = linear(library, x, weight.data, weight.scale, granularity, out_dtype=torch.float32).double()
        expected = product(x, weight.data, weight.scale, granularity)
        magnitude = x.double().abs() @ dequantize(weight).double().abs().t()
        assert ((y - expected).abs() <= k * 2.0**-24 * magnitude).all()
        rounded = linear(library, x, weight.data, weight.scale, granularity, out_dtype=out_dtype)
        assert rounded.equal(y.to(out_dtype))


@pytest.mark.parametrize("m", [1, 4, 40])
def test_long_sums_are_as_accurate_as_short_ones(library, m):
    """They start again from zero on the way: one sum of 14336 products, lane by lane, errs by 5e-7 to 1e-6."""
    torch.manual_seed(11)
    data, scale = torch.randn(64, 14336).to(torch.float8_e4m3fn), torch.ones(64, 1)
    x = torch.randn(m, 14336)
    expected = product(x, data, scale, ROW)
    error = linear(library, x, data, scale, ROW).double() - expected
    assert error.norm() / expected.norm() < 4e-7


def test_float32_activations_keep_all_their_bits(library):
    """A single product has no summation error: only the rounding of the scale could remain, and there is none."""
    torch.manual_seed(5)
    x = torch.randn(33, 1) * torch.exp2(torch.randint(-60, 60, (33, 1)).float())
    data, scale = torch.ones(9, 1).to(torch.float8_e4m3fn), torch.ones(9, 1)
    for m in (1, 33):
        assert linear(library, x[:m], data, scale, ROW).equal(x[:m].expand(m, 9))


def test_the_number_of_threads_changes_nothing(library, threads):
    torch.manual_seed(6)
    weight = quantize(torch.randn(300, 2100), ROW)
    w = torch.randn(300, 2100).bfloat16()
    for m in (1, 3, 130):
        x = torch.randn(m, 2100).bfloat16()
        results = []
        for count in (1, 2, 5, 2):
            threads(count)
            results.append(linear(library, x, weight.data, weight.scale, ROW))
        assert all(result.equal(results[0]) for result in results)
    for granularity in (ROW, TENSOR):
        expected = quantize(w, granularity)
        for count in (1, 2, 5):
            threads(count)
            assert all(a.equal(b) for a, b in zip(cast(library, w, granularity), as_bytes(expected), strict=True))


def test_two_python_threads_at_once(library):
    torch.manual_seed(7)
    weight = quantize(torch.randn(200, 2000), ROW)
    xs = [torch.randn(m, 2000).bfloat16() for m in (1, 20, 90)]
    expected = [linear(library, x, weight.data, weight.scale, ROW) for x in xs]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(10):
            for x, y in zip(xs, expected, strict=True):
                if not linear(library, x, weight.data, weight.scale, ROW).equal(y):
                    wrong.append(x.shape[0])

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("granularity", [ROW, BLOCK_128], ids=str)
def test_grouped_is_linear_for_each_expert(library, granularity):
    torch.manual_seed(8)
    experts, n, k = 4, 40, 200
    weight = quantize(torch.randn(experts, n, k), granularity)
    bias = torch.randn(experts, n).bfloat16()
    ends = torch.tensor([3, 3, 20, 21], dtype=torch.int32)
    x = torch.randn(21, k).bfloat16()
    out = torch.empty(21, n, dtype=torch.bfloat16)
    library.grouped(x, weight.data, weight.scale, *granularity.block((n, k)), ends, bias, out)
    for e, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        assert out[start:end].equal(
            linear(library, x[start:end], weight.data[e], weight.scale[e], granularity, bias[e])
        )


def test_wrong_operands_are_all_named(library):
    x, out = torch.ones(2, 8), torch.empty(2, 4)
    data, scale = torch.ones(4, 8).to(torch.float8_e4m3fn), torch.ones(4, 1)
    with pytest.raises(ValueError, match=r"x must be bfloat16, float16 or float32.*float64.*scale must be .*\[4, 1\]"):
        library.linear(x.double(), data, scale.t(), 1, 8, None, out)
    with pytest.raises(ValueError, match=r"data must be float8_e4m3fn \[\.\.\., 8\].*float8_e5m2"):
        library.linear(x, data.to(torch.float8_e5m2), scale, 1, 8, None, out)
    with pytest.raises(ValueError, match=r"x must be .* unit stride along K"):
        library.linear(torch.ones(8, 2).t(), data, scale, 1, 8, None, out)
    with pytest.raises(ValueError, match=r"bias must be .*\[4\].*found torch.float32 \[5\].*out must be .*\[2, 4\]"):
        library.linear(x, data, scale, 1, 8, torch.ones(5), out[:1])
    with pytest.raises(ValueError, match="rows and cols must be at least 1, found 0 and 8"):
        library.linear(x, data, scale, 0, 8, None, out)
    overlapping = torch.empty(7).as_strided((2, 4), (3, 1))
    with pytest.raises(ValueError, match=r"out must be .* strides \[3, 1\]"):
        library.linear(x, data, scale, 1, 8, None, overlapping)
    codes = torch.empty(15, dtype=torch.uint8).as_strided((2, 8), (7, 1))
    with pytest.raises(ValueError, match="data_out must be"):
        library.quantize(x, 1, 8, codes, torch.empty(2, 1))
    for ends in ([1, 0], [1, 3], [1, 1]):
        with pytest.raises(ValueError, match="ends must ascend to M = 2"):
            library.grouped(x, data.expand(2, 4, 8), torch.ones(2, 4, 1), 1, 8, torch.tensor(ends).int(), None, out)
    with pytest.raises(ValueError, match="ends must be contiguous int32"):
        library.grouped(x, data.expand(2, 4, 8), torch.ones(2, 4, 1), 1, 8, torch.tensor([1, 2]), None, out)
    with pytest.raises(ValueError, match=r"scale_out must be contiguous float32 \[2, 1\]"):
        library.quantize(x, 1, 8, torch.empty(2, 8, dtype=torch.uint8), scale)
    with pytest.raises(ValueError, match="data_out must be"):
        library.quantize(x, 1, 8, torch.empty(2, 8), torch.empty(2, 1))


def test_kernels_are_reported_by_name():
    assert isinstance(FOUND, native.Library)
    cpu = Path("/proc/cpuinfo")
    intel = cpu.exists() and "GenuineIntel" in cpu.read_text()
    for level in PATHS:
        lowered = FOUND.lowered(level)
        # Intel's processors multiply fp32 faster than pairs of bf16.
        assert lowered.path_for(64, torch.bfloat16) == ("avx512" if level == "avx512_bf16" and intel else level)
        assert lowered.path_for(1, torch.bfloat16) == ("avx512_bf16" if level == "amx" else level)
        assert level in lowered.features
        assert lowered.path_for(64, torch.float32) == ("avx512" if level == "avx512_bf16" else level)
    assert FOUND.lowered("portable").features <= {"portable", "threads"}


# ---- the quantizer


def cast(library, x, granularity, **options) -> tuple[torch.Tensor, torch.Tensor]:
    data = torch.empty(x.shape, dtype=torch.uint8)
    scale = torch.empty(granularity.scale_shape(x.shape))
    library.quantize(x, *granularity.block(x.shape), data, scale, **options)
    return data, scale.view(torch.int32)


def as_bytes(weight) -> tuple[torch.Tensor, torch.Tensor]:
    return weight.data.view(torch.uint8), weight.scale.view(torch.int32)


def assert_quantizes_as_torch_does(library, x, granularity, *, ue8m0=False):
    expected = quantize(x, granularity, scale_format="ue8m0" if ue8m0 else "float32")
    data, scale = cast(library, x, granularity, ue8m0=ue8m0)
    assert scale.equal(as_bytes(expected)[1])
    different = data != as_bytes(expected)[0]
    assert not different.any(), (x[different][:5], data[different][:5], as_bytes(expected)[0][different][:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_quantizes_every_16_bit_number(library, dtype, granularity):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    assert_quantizes_as_torch_does(library, x, granularity)
    assert_quantizes_as_torch_does(library, x[::3, 1:].t().contiguous(), granularity, ue8m0=True)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(0, 140),
    k=st.integers(0, 300),
    granularity=st.sampled_from(GRANULARITIES),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-140, 120),
    raw=st.booleans(),
    ue8m0=st.booleans(),
    path=st.sampled_from(PATHS or ["portable"]),
)
def test_quantizes_bit_for_bit(seed, n, k, granularity, dtype, exponent, raw, ue8m0, path):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k + 3, generator=generator) * math.ldexp(1.0, exponent)
    if raw:
        x = torch.randint(-(2**31), 2**31, (n, k + 3), generator=generator, dtype=torch.int32).view(torch.float32)
    x = torch.where(torch.rand(n, k + 3, generator=generator) < 0.1, -0.0, x).to(dtype)[:, :k]
    assert isinstance(FOUND, native.Library)
    assert_quantizes_as_torch_does(FOUND.lowered(path), x, granularity, ue8m0=ue8m0)


def test_quantizes_what_lies_between_two_codes_to_even(library):
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([codes, between, torch.nextafter(between, torch.zeros(1)), torch.nextafter(between, codes[1:])])
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan])])[None]
    assert_quantizes_as_torch_does(library, x, ROW)
    assert_quantizes_as_torch_does(library, x.expand(3, -1), TENSOR)


# ---- buffers, processes, the compiler


def guarded(size: int, *, writable: bool) -> tuple[int, mmap.mmap]:
    """An address at which `size` bytes are readable and the next one faults."""
    page = mmap.PAGESIZE
    room = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(start + room, page, 0) == 0
    return start + room - size, memory


def guarded_copy(tensor: torch.Tensor) -> tuple[torch.Tensor, mmap.mmap]:
    """`tensor` placed to end at the last byte before an unreadable page."""
    address, memory = guarded(tensor.nbytes, writable=True)
    raw = torch.frombuffer((ctypes.c_char * max(tensor.nbytes, 1)).from_address(address), dtype=torch.uint8)
    copy = raw[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor), memory


def stay_inside(instructions: str) -> None:
    """Products and casts whose operands all end at the end of readable memory; run in a separate process."""
    found = native.find()
    assert isinstance(found, native.Library)
    library = found.lowered(instructions)
    kept: list[mmap.mmap] = []

    def guard(tensor: torch.Tensor) -> torch.Tensor:
        copy, memory = guarded_copy(tensor)
        kept.append(memory)
        return copy

    for dtype, granularity in itertools.product(DTYPES, (ROW, MX, BLOCK_128, Granularity(3, 50))):
        for (n, k), m in itertools.product([(1, 1), (17, 33), (33, 65), (40, 100), (3, 513)], (1, 2, 18)):
            kept.clear()
            data, scale = exact_weight(n, k, granularity)
            x, bias = torch.ones(m, k).to(dtype), torch.ones(n).to(dtype)
            out = guard(torch.zeros(m, n).to(dtype))
            operands = [guard(tensor) for tensor in (x, data, scale)]
            library.linear(*operands, *granularity.block((n, k)), guard(bias), out)
            assert out.equal(product(x, data, scale, granularity, bias).to(dtype))
            codes, scales = (
                guard(torch.zeros(m, k, dtype=torch.uint8)),
                guard(torch.empty(granularity.scale_shape(x.shape))),
            )
            library.quantize(operands[0], *granularity.block(x.shape), codes, scales)


def overrun() -> None:
    """The counterexample: reading one row too many from guarded data."""
    assert isinstance(FOUND, native.Library)
    data, _memory = guarded_copy(torch.zeros(64, 64).to(torch.float8_e4m3fn))
    operands = torch.ones(1, 64), data, torch.ones(65, 1)
    problem = _problem(*operands, 1, 64, None, torch.empty(1, 65), True)
    problem.n = 65
    FOUND.functions.fp8gemm_linear(FOUND.level, 1, ctypes.byref(problem))


def run_in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
    )


@pytest.mark.parametrize("path", PATHS)
def test_no_byte_beyond_a_buffer_is_touched(path):
    result = run_in_process(f"import test_native; test_native.stay_inside({path!r})")
    assert result.returncode == 0, result.stderr


def test_a_byte_beyond_a_buffer_would_be_noticed():
    result = run_in_process("import test_native; test_native.overrun()")
    assert result.returncode == -11, result


CHILD = """
import torch
from fp8gemm import native
K = 4096
library = native.find()
operands = torch.ones(4, K).bfloat16(), torch.ones(600, K).to(torch.float8_e4m3fn), torch.ones(600, 1)
def multiply():
    out = torch.empty(4, 600).bfloat16()
    library.linear(*operands, 1, K, None, out)
    return bool(out.eq(K).all())
"""


def multiply(queue) -> None:
    namespace: dict[str, object] = {}
    exec(CHILD, namespace)
    queue.put(namespace["multiply"]())  # type: ignore[operator]


def test_a_forked_process_does_not_wait_for_threads_it_has_not():
    result = run_in_process(
        CHILD
        + """
import os, signal
assert multiply()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if multiply() else 1)
assert os.waitpid(child, 0)[1] == 0
assert multiply()
"""
    )
    assert result.returncode == 0, result.stderr


def test_a_spawned_process():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=multiply, args=(queue,))
    process.start()
    assert queue.get(timeout=120)
    process.join()
