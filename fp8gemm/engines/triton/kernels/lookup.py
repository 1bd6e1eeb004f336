# mypy: ignore-errors
# Triton is untyped, and not installed everywhere.
"""Looking up rows of an FP8 table and dequantizing them; ``fp8gemm.numerics.dequantize`` is the reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import divide_up, launch
from .parts import decode, format_of

BLOCK = 1024


def look_up(
    ids: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    native: bool,
) -> torch.Tensor:
    """Rows ``ids [M]`` of ``data [N, K] * scale`` as ``[M, K]`` of ``dtype``, computed in float32 and rounded once.

    ``scale`` is contiguous float32 ``[ceil(N / rows), ceil(K / cols)]``; ``native`` means that Triton accepts pointers
    to e4m3 on this GPU. An id out of range gives NaN, as a kernel cannot raise an error.
    """
    n, k = data.shape
    y = torch.empty(ids.shape[0], k, dtype=dtype, device=data.device)
    if y.numel():
        codes, how = format_of(data, native=native)
        args = (ids, codes, scale, y, n, k, data.stride(0), rows, cols, divide_up(k, cols))
        block = min(BLOCK, max(triton.next_power_of_2(k), 16))
        launch(kernel, (ids.shape[0], divide_up(k, block)), args, {"BLOCK": block, "FORMAT": how}, num_warps=4)
    return y


@triton.jit
def kernel(
    ids, data, scale, y, N, K, stride, ROWS, COLS, blocks, BLOCK: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token).to(tl.int64)
    inside = (row >= 0) & (row < N)
    row = tl.where(inside, row, 0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = decode(tl.load(data + row * stride + k, mask=k < K, other=0.0), tl.float32, FORMAT)
    factor = tl.load(scale + row // ROWS * blocks + k // COLS, mask=k < K, other=0.0)
    value = tl.where(inside, value * factor, float("nan"))
    tl.store(y + token * K + k, value.to(y.dtype.element_ty), mask=k < K)
