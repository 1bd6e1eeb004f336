"""Quantizing activations before a library's product: the layout of the result, and who computes it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from fp8gemm import GROUP_128, ROW, TENSOR, ScaledTensor, dequantize, quantize
from fp8gemm.engines import activations
from fp8gemm.engines.activations import group_scales, quantize_tokens

STATIC = torch.tensor(0.02)


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("granularity", [ROW, TENSOR, GROUP_128], ids=str)
def test_it_rounds_like_the_definition(granularity, scale_format) -> None:
    x = torch.randn(7, 300).to(torch.bfloat16)
    data, scale = quantize_tokens(x, granularity, scale_format=scale_format)
    expected = quantize(x, granularity, scale_format=scale_format)
    assert data.float().equal(expected.data.float())
    assert scale.equal(expected.scale)
    assert data.is_contiguous()


def test_a_static_scale_is_one_scale() -> None:
    x = torch.randn(7, 300).to(torch.bfloat16)
    data, scale = quantize_tokens(x, ROW, static=STATIC)
    assert data.float().equal(quantize(x, TENSOR, scale=STATIC).data.float())
    assert scale.shape == (1, 1)


@pytest.mark.parametrize("m", [1, 3, 4, 7, 8])
def test_scales_of_groups_are_m_major(m: int) -> None:
    x = torch.randn(m, 300).to(torch.bfloat16)
    for multiple in (1, 4):
        data, scale = quantize_tokens(x, GROUP_128, multiple=multiple)
        rows = m + -m % multiple
        assert data.shape == (rows, 300)
        assert scale.shape == (rows, 3)
        assert scale.stride() == (1, m + -m % 4)
        assert dequantize(ScaledTensor(data, scale, GROUP_128))[:m].equal(dequantize(quantize(x, GROUP_128)))


def test_scales_that_are_m_major_are_not_copied() -> None:
    _, scale = quantize_tokens(torch.randn(8, 300), GROUP_128)
    assert group_scales(scale, 4) is scale
    assert group_scales(scale[:3]).stride() == (1, 4), "3 tokens of 8 have another pitch than 3 of 3"


def test_our_kernels_round_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def kernel(name: str) -> object:
        return lambda x, rounding, **more: asked.append((name, rounding.ue8m0, more)) or (x, x)

    kernels = SimpleNamespace(Rounding=SimpleNamespace, quantize_groups=kernel("groups"), quantize_rows=kernel("rows"))
    monkeypatch.setitem(sys.modules, "fp8gemm.engines.triton.kernels.quantize", kernels)
    monkeypatch.setattr(activations, "fused", lambda device: True)
    x = torch.randn(4, 256)
    quantize_tokens(x, GROUP_128, scale_format="ue8m0", multiple=4)
    quantize_tokens(x, ROW)
    assert asked == [("groups", True, {"multiple": 4}), ("rows", False, {})]


def test_kernels_that_round_otherwise_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 300)
    expected = quantize(x, ROW)
    assert activations._alike((expected.data, expected.scale), expected)
    assert not activations._alike((expected.data, 2 * expected.scale), expected)
    assert not activations._alike((expected.data.flip(0), expected.scale), expected)
    assert not activations.fused(torch.device("cpu"))
