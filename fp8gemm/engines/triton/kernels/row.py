# mypy: ignore-errors
# Triton is untyped, and not installed everywhere.
"""``y = (xq * x_scale) @ (w * w_scale).T + bias``, both operands e4m3, scales constant along K and applied at the end.

Reference: ``ReferenceEngine`` under row or tensor schemes. Persistent: one program per multiprocessor, which loops
over tiles. Any N and K; with ``tma`` K must be a multiple of 16 (strides of tensor maps are multiples of 16 bytes),
and reads beyond an edge give zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...base import PackedWeight
from ..launch import divide_up, launch
from ..plan import Promotion
from ..replay import descriptor, empty

# The most products whose sum stays in a tensor core's accumulator if it is promoted (DeepSeek-V3 report, 3.3.2).
_TOGETHER = tl.constexpr(128)


def multiply_rows(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    promotion: Promotion,
    tma: bool,
    weight_first: bool = False,
    programs: int,
    block_m: int,
    block_n: int,
    block_k: int,
    warps: int,
    stages: int,
) -> torch.Tensor:
    """``xq [M, K]`` contiguous with ``x_scale [M, 1]`` or ``[1, 1]``, times a weight with scales constant along K.

    ``weight_first``: pipelined products are ``w @ x.T``. On sm_8x, Triton 3.9 carries the operands of ``x @ w.T`` from
    step to step (triton#9806, #9913), packing and unpacking their bytes, but does not look behind a transposition:
    compiled for sm_89, 128 x 128 take 441 instructions a step and spill, and 184 so (3.6: 185 and 184). Counted in
    machine code that was compiled ahead of time, not measured on a card.
    """
    m, k = xq.shape
    n = weight.n
    y = empty(m, n, dtype=out_dtype, device=xq.device)
    x, w = xq, weight.data
    if tma:
        x, w = descriptor(xq, [block_m, block_k]), descriptor(weight.data, [block_n, block_k])
    tiles = divide_up(m, block_m) * divide_up(n, block_n)
    constants = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "PROGRAMS": programs,  # also where fewer run, so that M changes nothing: each then has one tile
        "TMA": tma,
        "EVEN_K": k % block_k == 0,
        "X_STEP": int(x_scale.numel() > 1),
        "HAS_BIAS": bias is not None,
        "PROMOTION": promotion,
        "WEIGHT_FIRST": weight_first and stages > 1,
    }
    args = (x, w, x_scale, weight.scale, y if bias is None else bias, y, m, n, k, weight.scheme.weight.rows or n)
    launch(row_kernel, (min(tiles, programs),), args, constants, num_warps=warps, num_stages=stages)
    return y


@triton.jit
def tile_place(tile, tiles_m, tiles_n, TOGETHER: tl.constexpr):
    """The (row, column) of a tile: ``TOGETHER`` rows advance along the columns side by side, sharing w in L2."""
    width = TOGETHER * tiles_n
    first = (tile // width) * TOGETHER
    height = tl.minimum(tiles_m - first, TOGETHER)
    return first + (tile % width) % height, (tile % width) // height


@triton.jit
def multiply_add(a, b, total, PROMOTION: tl.constexpr, WEIGHT_FIRST: tl.constexpr):
    """``total + a @ b`` for FP8 ``a`` and ``b``; promotion adds up sums of at most 128 products in float32.

    ``max_num_imprecise_acc`` inserts those additions on Hopper only. Elsewhere, "sum" sets it because Triton moves the
    addition into the tensor core's accumulator if it is 0, its default there.
    """
    most: tl.constexpr = min(_TOGETHER, a.shape[1])
    if WEIGHT_FIRST:
        a, b, total = b.T, a.T, total.T
    if PROMOTION == "none":
        total = tl.dot(a, b, total)
    elif PROMOTION == "instruction":
        total = tl.dot(a, b, total, max_num_imprecise_acc=most)
    else:
        tl.static_assert(a.shape[1] <= _TOGETHER)
        total += tl.dot(a, b, max_num_imprecise_acc=most)
    return total.T if WEIGHT_FIRST else total


@triton.jit
def multiply_tile(
    x,
    w,
    m0,
    n0,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    PROMOTION: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
):
    """The float32 products ``[BLOCK_M, BLOCK_N]`` of one tile, without scales."""
    step = tl.arange(0, BLOCK_K)
    if not TMA:
        # Rows past the edge read the last row instead: the loop needs no mask, and they are not stored.
        m = tl.minimum(m0 + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
        n = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        x_tile = x + m[:, None] * K + step[None, :]
        w_tile = w + n[None, :] * K + step[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if TMA:
            a = x.load([m0, start])
            b = w.load([n0, start]).T
        elif EVEN_K:
            a = tl.load(x_tile + start)
            b = tl.load(w_tile + start)
        else:
            inside = start + step < K
            a = tl.load(x_tile + start, mask=inside[None, :], other=0.0)
            b = tl.load(w_tile + start, mask=inside[:, None], other=0.0)
        total = multiply_add(a, b, total, PROMOTION, WEIGHT_FIRST)
    return total


@triton.jit(do_not_specialize=["M"])
def row_kernel(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    y,
    M,
    N,
    K,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    X_STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PROMOTION: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        tile_m, tile_n = tile_place(tile, tiles_m, tiles_n, 8)
        m0, n0 = tile_m * BLOCK_M, tile_n * BLOCK_N
        total = multiply_tile(x, w, m0, n0, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA, EVEN_K, PROMOTION, WEIGHT_FIRST)
        m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        token_scale = tl.load(x_scale + m * X_STEP, mask=m < M, other=0.0)
        total *= token_scale[:, None] * tl.load(w_scale + n // rows, mask=n < N, other=0.0)[None, :]
        if HAS_BIAS:
            total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        at = m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(y + at, total.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
