"""Quantization kernels agree with ``fp8gemm.quantize`` bit for bit."""

from __future__ import annotations

import pytest
import stage  # noqa: F401  it mends the interpreter's conversions
import torch
import torch.nn.functional as F

from fp8gemm import GROUP_128, MX, ROW, quantize
from fp8gemm.engines.triton.kernels import quantize as kernels
from fp8gemm.engines.triton.kernels.quantize import Rounding

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (1, 7), (5, 33), (17, 160), (3, 300)]


def special(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary tokens, zeros, NaN, infinities, and the smallest and largest values."""
    x = torch.randn(m, k)
    rows = [
        torch.zeros(k),
        torch.full((k,), torch.finfo(dtype).smallest_normal / 4),
        torch.full((k,), torch.finfo(dtype).max),
        torch.full((k,), float("nan")),
    ]
    x = torch.cat([x, torch.stack(rows), torch.randn(3, k) * 1e-30])
    x[-1, 0], x[-2, k - 1], x[-3, k // 2] = float("nan"), float("inf"), -float("inf")
    return x.to(dtype)


def same(data: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal codes, where all NaN codes are equal."""
    return torch.equal(data.float().nan_to_num(nan=1e9), expected.float().nan_to_num(nan=1e9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ue8m0", [False, True])
def test_rows_and_groups(shape: tuple[int, int], dtype: torch.dtype, ue8m0: bool) -> None:
    x = special(*shape, dtype)
    scale_format = "ue8m0" if ue8m0 else "float32"
    for kernel, granularity in ((kernels.quantize_rows, ROW), (kernels.quantize_groups, GROUP_128)):
        data, scale = kernel(x, Rounding(ue8m0=ue8m0))
        expected = quantize(x, granularity, scale_format=scale_format)
        assert scale.equal(expected.scale)
        assert same(data, expected.data)


def test_groups_are_stored_token_major() -> None:
    """The scales of a group are contiguous over all tokens, in columns padded to a multiple of 4."""
    _, scale = kernels.quantize_groups(torch.randn(5, 300))
    assert scale.shape == (5, 3)
    assert scale.stride() == (1, 8)


def test_groups_of_32() -> None:
    x = torch.randn(5, 100).to(torch.bfloat16)
    data, scale = kernels.quantize_groups(x, Rounding(ue8m0=True), group=32)
    expected = quantize(x, MX, scale_format="ue8m0")
    assert scale.equal(expected.scale)
    assert same(data, expected.data)


def test_static_scale() -> None:
    x = special(5, 40, torch.bfloat16)
    static = torch.tensor(0.01)
    data, scale = kernels.quantize_rows(x, Rounding(static=static))
    assert scale.equal(static.reshape(1, 1))
    assert same(data, quantize(x, ROW, scale=static).data)


@pytest.mark.parametrize("rounding", [Rounding(), Rounding(static=torch.tensor(0.01))], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_rows_too_long_for_registers(gated: bool, rounding: Rounding, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes over the row give the same bits as one."""
    x = special(2, 80, torch.bfloat16)
    up = torch.randn(x.shape).to(torch.bfloat16) if gated else None
    once = kernels.quantize_rows(x, rounding, up=up)
    monkeypatch.setattr(kernels, "LONGEST_ROW", 16)
    twice = kernels.quantize_rows(x, rounding, up=up)
    assert same(once[0], twice[0])
    assert once[1].equal(twice[1])


@pytest.mark.parametrize("m", [3, 1100])
def test_rows_of_a_wider_tensor(m: int) -> None:
    """Any row stride; and several rows per program if there are many."""
    x = torch.randn(m, 40)[:, 3:30]
    data, scale = kernels.quantize_rows(x)
    expected = quantize(x.contiguous(), ROW)
    assert scale.equal(expected.scale)
    assert same(data, expected.data)


def test_silu_times_up() -> None:
    """At most one FP8 step from the product in float64: the kernel's exponential differs from torch's.

    Gate and up are halves of one product, as from fused siblings, or separate tensors.
    """
    gate, up = torch.randn(9, 2 * 70)[:, :70], torch.randn(9, 71)[:, 1:]
    product = F.silu(gate.double()) * up.double()
    for kernel, granularity in ((kernels.quantize_rows, ROW), (kernels.quantize_groups, GROUP_128)):
        data, scale = kernel(gate, up=up)
        expected = quantize(product, granularity)
        torch.testing.assert_close(scale, expected.scale, rtol=1e-6, atol=0)
        steps = data.view(torch.uint8).int() - expected.data.view(torch.uint8).int()
        assert steps.abs().max() <= 1
        assert (steps != 0).float().mean() < 0.02


def test_nothing() -> None:
    for shape in ((0, 5), (3, 0)):
        data, scale = kernels.quantize_rows(torch.empty(shape))
        assert data.shape == shape
        assert scale.shape == (shape[0], 1)
        data, scale = kernels.quantize_groups(torch.empty(shape))
        assert data.shape == shape
