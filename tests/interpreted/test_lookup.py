"""Looked-up rows have the bits of ``dequantize``, whether the hardware or integer operations decode e4m3."""

from __future__ import annotations

import pytest
import stage  # noqa: F401  it mends the interpreter's conversions
import torch

from fp8gemm import BLOCK_128, MX, ROW, TENSOR, dequantize, quantize
from fp8gemm.engines.triton.kernels.lookup import look_up


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("grid", [ROW, TENSOR, BLOCK_128, MX])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_have_the_bits_of_dequantize(dtype: torch.dtype, grid, native: bool) -> None:
    w = torch.randn(140, 1100)
    w[3, 5], w[130] = float("nan"), 0.0
    table = quantize(w, grid)
    ids = torch.tensor([139, 0, 3, 130, 3])
    for index in (ids, ids.to(torch.int32)):
        found = look_up(index, table.data, table.scale, *grid.block(table.shape), dtype, native=native)
        assert torch.equal(found.nan_to_num(nan=7.0), dequantize(table, dtype)[ids].nan_to_num(nan=7.0))
    outside = torch.tensor([140, -1, 2])
    found = look_up(outside, table.data, table.scale, *grid.block(table.shape), dtype, native=native)
    assert found.isnan().all(dim=1).tolist() == [True, True, False]
    none = look_up(ids[:0], table.data, table.scale, *grid.block(table.shape), dtype, native=native)
    assert none.shape == (0, 1100)
