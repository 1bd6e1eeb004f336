"""Looking up rows in FP8, and dequantizing whole matrices: the same bits as ``numerics.dequantize``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp8gemm import FP8GemmOptions, Granularity, ScaledTensor, native
from fp8gemm.numerics import dequantize, quantize
from fp8gemm.weights import convert
from fp8gemm.weights.lookup import dequantized, rows_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRIDS = [Granularity(1, None), Granularity(None, None), Granularity(128, 128), Granularity(1, 32), Granularity(3, 7)]


def weight(n: int, k: int, grid: Granularity) -> ScaledTensor:
    """All codes, including NaN, with scales of many magnitudes."""
    data = (torch.arange(n * k) * 7 % 256).to(torch.uint8).view(n, k).view(torch.float8_e4m3fn)
    scale = 2.0 ** torch.randint(-30, 12, grid.scale_shape((n, k))) * (1 + torch.rand(grid.scale_shape((n, k))))
    return ScaledTensor(data, scale, grid)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    nan = expected.isnan()
    return torch.equal(found.isnan(), nan) and torch.equal(found[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [(300, 200), (5, 1), (1, 129), (40, 64)])
def test_the_bits_are_those_of_dequantize(size: tuple[int, int], grid: Granularity, dtype: torch.dtype) -> None:
    w = weight(*size, grid)
    expected = dequantize(w, dtype)
    assert same(dequantized(w, dtype), expected)
    for ids in (torch.randint(size[0], (2, 3)), torch.tensor(0), torch.empty(0, 4, dtype=torch.int64)):
        assert same(rows_of(w, ids, dtype), expected[ids])
        assert same(rows_of(w, ids.to(torch.int32), dtype), expected[ids])


@pytest.mark.parametrize("grid", GRIDS)
def test_every_level_of_instructions_agrees(grid: Granularity) -> None:
    library = native.find()
    if not isinstance(library, native.Library):
        return  # no compiled kernels: torch computed all of the above
    w = weight(70, 173, grid)
    ids = torch.randint(70, (9,))
    for level in library.levels[: library.level + 1]:
        lowered = library.lowered(level)
        for dtype in DTYPES:
            found = lowered.lookup(w.data, w.scale, *grid.block(w.shape), ids, dtype)
            assert same(found, dequantize(w, dtype)[ids])


def test_strides_dtypes_and_large_values() -> None:
    wide = weight(64, 96, Granularity(1, None))
    cut = ScaledTensor(wide.data[:, 8:72], wide.scale, wide.granularity)
    assert same(dequantized(cut, torch.float32), dequantize(cut))
    scales = weight(64, 96, Granularity(1, 32))
    part = ScaledTensor(scales.data[:, :64], scales.scale[:, :2], scales.granularity)  # scales that are not contiguous
    assert same(dequantized(part, torch.float32), dequantize(part))
    e5m2 = quantize(torch.randn(16, 32), dtype=torch.float8_e5m2)
    assert torch.equal(rows_of(e5m2, torch.tensor([3]), torch.float32), dequantize(e5m2)[[3]])
    large = ScaledTensor(quantize(torch.randn(4, 32)).data, torch.full((4, 1), 3e36), Granularity(1, None))
    assert same(dequantized(large, torch.float16), dequantize(large, torch.float16))  # infinities


@pytest.mark.parametrize("ids", [[7], [-1], [2**40]])
def test_ids_that_are_none_of_a_row_raise_as_in_torch(ids: list[int]) -> None:
    table = nn.Embedding(7, 16)
    convert(table, "weight", FP8GemmOptions())
    with pytest.raises((IndexError, RuntimeError), match=r"a weight with 7 rows|index"):
        table(torch.tensor(ids))


def test_embedding_options_and_gradients() -> None:
    table = nn.Embedding(7, 16, padding_idx=2)
    convert(table, "weight", FP8GemmOptions())
    values = table.weight.dequantize()
    ids = torch.tensor([[0, 2, 6]])
    assert torch.equal(table(ids), values[ids])
    assert not table(ids).requires_grad
    assert torch.equal(F.embedding(ids, table.weight, max_norm=None, scale_grad_by_freq=True), values[ids])
    assert torch.equal(table.weight[torch.tensor([-1])], values[[-1]])
    compiled = torch.compile(table, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids), values[ids])
    renormed = F.embedding(ids, table.weight, max_norm=0.5)  # torch writes to the table
    assert torch.allclose(renormed.norm(dim=-1), torch.tensor([[0.5, 0.0, 0.5]]), rtol=1e-5)
