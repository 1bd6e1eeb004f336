# mypy: ignore-errors
# Triton is untyped, and not installed everywhere.
"""Weight-only ``y = x @ (w * scale).T + bias`` in one launch: for few tokens, where reading w dominates.

Reference: ``ReferenceEngine`` under a weight-only scheme. A product split along K uses a workspace, which the last
program of each tile sums in a fixed order: no atomics on values, the same bits at every call. ``native`` says whether
the GPU itself decodes e4m3 (compute capability 8.9 and newer).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...base import PackedWeight
from ..launch import divide_up, launch
from ..replay import empty, split_counters
from .parts import decode, format_of, is_last, sum_parts


def multiply_vectors(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    native: bool,
    block_n: int,
    block_k: int,
    splits: int,
    warps: int,
    stages: int = 1,
) -> torch.Tensor:
    """For M <= 4 and scales constant along K: float32 multiply-adds without tensor cores."""
    m, k = x.shape
    n = weight.n
    y = empty(m, n, dtype=out_dtype, device=x.device)
    data, decoding = format_of(weight.data, native=native)
    tokens = triton.next_power_of_2(m)
    tiles = divide_up(n, block_n)
    parts, arrived = _workspace(y, splits, tokens * n, tiles)
    constants = {
        "TOKENS": tokens,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "SPLITS": splits,
        "STAGES": stages,
        "EVEN_K": k % block_k == 0,
        "HAS_BIAS": bias is not None,
        "FORMAT": decoding,
    }
    given = y if bias is None else bias
    args = (x, data, weight.scale, given, y, parts, arrived, m, n, k, x.stride(0), weight.scheme.weight.rows or n)
    launch(vector_kernel, (tiles, splits), args, constants, num_warps=warps)
    return y


def multiply_tokens(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    native: bool,
    block_m: int,
    block_n: int,
    block_k: int,
    splits: int,
    warps: int,
    stages: int,
) -> torch.Tensor:
    """On tensor cores, as ``y.T = w @ x.T`` so that decoded weights stay in registers; for any M, intended for up to
    64.

    If scales vary along K, ``block_k`` must divide their extent.
    """
    m, k = x.shape
    n = weight.n
    y = empty(m, n, dtype=out_dtype, device=x.device)
    data, decoding = format_of(weight.data, native=native)
    tiles = divide_up(m, block_m) * divide_up(n, block_n)
    parts, arrived = _workspace(y, splits, m * n, tiles)
    constants = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "SPLITS": splits,
        "SCALE_COLS": weight.scheme.weight.cols or 0,
        "EVEN_K": k % block_k == 0,
        "HAS_BIAS": bias is not None,
        "FORMAT": decoding,
    }
    given = y if bias is None else bias
    rows, scale_stride = weight.scheme.weight.rows or n, weight.scale.shape[1]
    args = (x, data, weight.scale, given, y, parts, arrived, m, n, k, x.stride(0), rows, scale_stride)
    launch(token_kernel, (tiles, splits), args, constants, num_warps=warps, num_stages=stages)
    return y


def dense(weight: PackedWeight, dtype: torch.dtype, *, native: bool) -> torch.Tensor:
    """The weight ``[N, K]`` dequantized to ``dtype`` in one pass, for many tokens on GPUs without FP8 products."""
    n, k = weight.n, weight.k
    w = empty(n, k, dtype=dtype, device=weight.data.device)
    data, decoding = format_of(weight.data, native=native)
    block = 1024
    args = (
        data,
        weight.scale,
        w,
        n,
        k,
        weight.scheme.weight.rows or n,
        weight.scheme.weight.cols or k,
        weight.scale.shape[1],
    )
    launch(dense_kernel, (n, divide_up(k, block)), args, {"BLOCK_K": block, "FORMAT": decoding}, num_warps=4)
    return w


def _workspace(y: torch.Tensor, splits: int, size: int, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The workspace and counters of a split product; placeholders if there is no split."""
    if splits == 1:
        return y, y
    return empty(splits * size, dtype=torch.float32, device=y.device), split_counters(tiles, y.device)


@triton.jit
def _token(x, token, x_stride, n, k, M, K, EVEN_K: tl.constexpr):
    """One token's features ``k`` in float32, as a tile ``[BLOCK_N, BLOCK_K]`` with the layout of the weight's.

    A row, which all threads share, would be passed through shared memory: 2 barriers a step, where a thread can load
    the few features that it needs. Past the last token it reads the last.
    """
    at = x + tl.minimum(token, M - 1) * tl.cast(x_stride, tl.int64) + tl.zeros_like(n)[:, None] + k[None, :]
    value = tl.load(at) if EVEN_K else tl.load(at, mask=(k < K)[None, :], other=0.0)
    return value.to(tl.float32)


@triton.jit
def _store_vector(
    total,
    token,
    n,
    scale,
    bias,
    y,
    parts,
    part,
    M,
    N,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Stores one token's outputs ``[BLOCK_N]``: into ``y``, or into the workspace of a split product."""
    if SPLITS > 1:
        at = (part * TOKENS + token) * tl.cast(N, tl.int64) + n
        tl.store(parts + at, total, mask=n < N)
    else:
        total = total * scale
        if HAS_BIAS:
            total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(
            y + token * tl.cast(N, tl.int64) + n,
            total.to(y.dtype.element_ty),
            mask=(n < N) & (tl.zeros_like(n) + token < M),
        )


@triton.jit(do_not_specialize=["M"])
def vector_kernel(
    x,
    w,
    scale,
    bias,
    y,
    parts,
    counters,
    M,
    N,
    K,
    x_stride,
    rows,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past N read row N - 1 instead: the loop needs no mask, and they are not stored.
    row = w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    step = tl.arange(0, BLOCK_K)
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    first = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    third = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    fourth = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.range(part * length, tl.minimum((part + 1) * length, K), BLOCK_K, num_stages=STAGES):
        k = start + step
        code = tl.load(row + k[None, :]) if EVEN_K else tl.load(row + k[None, :], mask=(k < K)[None, :], other=0.0)
        value = decode(code, tl.float32, FORMAT)
        first += value * _token(x, 0, x_stride, n, k, M, K, EVEN_K)
        if TOKENS > 1:
            second += value * _token(x, 1, x_stride, n, k, M, K, EVEN_K)
        if TOKENS > 2:
            third += value * _token(x, 2, x_stride, n, k, M, K, EVEN_K)
            fourth += value * _token(x, 3, x_stride, n, k, M, K, EVEN_K)
    s = tl.load(scale + n // rows, mask=n < N, other=0.0)
    _store_vector(tl.sum(first, 1), 0, n, s, bias, y, parts, part, M, N, TOKENS, SPLITS, HAS_BIAS)
    if TOKENS > 1:
        _store_vector(tl.sum(second, 1), 1, n, s, bias, y, parts, part, M, N, TOKENS, SPLITS, HAS_BIAS)
    if TOKENS > 2:
        _store_vector(tl.sum(third, 1), 2, n, s, bias, y, parts, part, M, N, TOKENS, SPLITS, HAS_BIAS)
        _store_vector(tl.sum(fourth, 1), 3, n, s, bias, y, parts, part, M, N, TOKENS, SPLITS, HAS_BIAS)
    if SPLITS > 1:  # noqa: SIM102  a constant, by which the rest is compiled or not
        if is_last(counters, tile, SPLITS):
            for token in tl.static_range(TOKENS):
                total = sum_parts(parts, token * tl.cast(N, tl.int64) + n, n < N, TOKENS * N, SPLITS)
                _store_vector(total, token, n, s, bias, y, parts, part, M, N, TOKENS, 1, HAS_BIAS)


@triton.jit
def _store_tokens(total, m, n, scale, bias, y, M, N, rows, EPILOGUE_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Stores outputs ``[BLOCK_N, BLOCK_M]`` into ``y [M, N]``, scaled if scales are constant along K."""
    if EPILOGUE_SCALE:
        total *= tl.load(scale + n // rows, mask=n < N, other=0.0)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["M"])
def token_kernel(
    x,
    w,
    scale,
    bias,
    y,
    parts,
    counters,
    M,
    N,
    K,
    x_stride,
    rows,
    scale_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALE_COLS: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)
    # Neighboring programs share a tile of w, the largest operand, in the L2 cache.
    m = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    inner_n = tl.minimum(n, N - 1)
    w_tile = w + inner_n.to(tl.int64)[:, None] * K + step[None, :]
    x_tile = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * x_stride + step[:, None]
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(part * length, tl.minimum((part + 1) * length, K), BLOCK_K):
        if EVEN_K:
            code = tl.load(w_tile + start)
            value = tl.load(x_tile + start)
        else:
            inside = start + step < K
            code = tl.load(w_tile + start, mask=inside[None, :], other=0.0)
            value = tl.load(x_tile + start, mask=inside[:, None], other=0.0)
        decoded = decode(code, x.dtype.element_ty, FORMAT)
        if SCALE_COLS == 0:
            total = tl.dot(decoded, value, total, input_precision="ieee")
        else:
            s = tl.load(scale + (inner_n // rows).to(tl.int64) * scale_stride + start // SCALE_COLS)
            total += tl.dot(decoded, value, input_precision="ieee") * s[:, None]
    if SPLITS == 1:
        _store_tokens(total, m, n, scale, bias, y, M, N, rows, SCALE_COLS == 0, HAS_BIAS)
    else:
        at = m.to(tl.int64)[None, :] * N + n[:, None]
        mask = (n < N)[:, None] & (m < M)[None, :]
        size = tl.cast(M, tl.int64) * N
        tl.store(parts + part * size + at, total, mask=mask)
        if is_last(counters, tile, SPLITS):
            total = sum_parts(parts, at, mask, size, SPLITS)
            _store_tokens(total, m, n, scale, bias, y, M, N, rows, SCALE_COLS == 0, HAS_BIAS)


@triton.jit
def dense_kernel(w, scale, y, N, K, rows, cols, scale_stride, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    value = decode(tl.load(w + n * K + k, mask=k < K, other=0.0), tl.float32, FORMAT)
    s = tl.load(scale + (n // rows) * scale_stride + k // cols, mask=k < K, other=0.0)
    tl.store(y + n * K + k, (value * s).to(y.dtype.element_ty), mask=k < K)
