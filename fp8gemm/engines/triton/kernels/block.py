# mypy: ignore-errors
# Triton is untyped, and not installed everywhere.
"""``y = x @ w.T + bias`` with one scale per 128 x 128 block of w, and one per token and group of 128 features.

Reference: ``ReferenceEngine`` under the block scheme. A group of activations is one step along K, so for few tokens
they are quantized inside the product: one launch, and no separate pass over x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...base import PackedWeight
from ..launch import divide_up, launch
from ..replay import empty, split_counters
from .parts import is_last, sum_parts
from .quantize import encode, finite, scale_of

BLOCK = 128  # of scales; also the step along K


def multiply_blocks(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    ue8m0: bool = False,
    weight_first: bool = False,
    block_m: int,
    block_n: int,
    splits: int,
    warps: int,
    stages: int,
) -> torch.Tensor:
    """``x [M, K]`` is floating point and quantized on the fly, or e4m3 with ``x_scale [M, K / 128]`` stored M-major.

    ``weight_first``: pipelined products of any M are ``w @ x.T``, as in ``row``.
    """
    m, k = x.shape
    n = weight.n
    y = empty(m, n, dtype=out_dtype, device=x.device)
    tiles = divide_up(m, block_m) * divide_up(n, block_n)
    parts, arrived = y, y
    if splits > 1:
        parts = empty(splits, m, n, dtype=torch.float32, device=x.device)
        arrived = split_counters(tiles, x.device)
    constants = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "SPLITS": splits,
        "INLINE": x_scale is None,
        "UE8M0": ue8m0,
        "EVEN_K": k % BLOCK == 0,
        "HAS_BIAS": bias is not None,
        "WEIGHT_FIRST": weight_first and stages > 1,
    }
    pitch = 0 if x_scale is None else x_scale.stride(1)
    given = y if bias is None else bias
    given_scale = weight.scale if x_scale is None else x_scale
    args = (x, weight.data, given_scale, weight.scale, given, y, parts, arrived, m, n, k, x.stride(0), pitch)
    args = (*args, weight.scale.shape[1])
    launch(block_kernel, (tiles, splits), args, constants, num_warps=warps, num_stages=stages)
    return y


@triton.jit
def round_group(value, UE8M0: tl.constexpr):
    """Quantizes floating ``[BLOCK_M, 128]`` to e4m3 with a scale per row."""
    value = value.to(tl.float32)
    s = scale_of(tl.max(tl.where(finite(value), tl.abs(value), 0.0), axis=1), UE8M0)
    return encode(value, s[:, None], tl.float8e4nv), s


@triton.jit
def multiply(a, b, WEIGHT_FIRST: tl.constexpr):
    """``a [BLOCK_M, 128] @ b [128, BLOCK_N]``; few tokens are columns of the matrix instruction, of which 8 suffice.

    Hopper's and Blackwell's FP8 instructions have 64 rows: with 16 or 32 tokens as rows, both operands would be decoded
    to float16 (sm_90, 16 x 128: 4.7 instructions per weight instead of 3.3).
    """
    return tl.dot(b.T, a.T).T if WEIGHT_FIRST or a.shape[0] < 64 else tl.dot(a, b)


@triton.jit(do_not_specialize=["M", "pitch"])
def block_kernel(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    y,
    parts,
    counters,
    M,
    N,
    K,
    x_stride,
    pitch,
    w_scale_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    INLINE: tl.constexpr,
    UE8M0: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, 128)
    # Rows past the edge read the last row instead: the loop needs no mask, and they are not stored.
    token = tl.minimum(m, M - 1).to(tl.int64)
    x_tile = x + token[:, None] * x_stride + step[None, :]
    w_tile = w + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + step[:, None]
    block_row = w_scale + (tile // tiles_m * BLOCK_N // 128).to(tl.int64) * w_scale_stride
    groups = tl.cdiv(K, 128)
    length = tl.cdiv(groups, SPLITS)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(part * length, tl.minimum((part + 1) * length, groups)):
        start = group * 128
        if EVEN_K:
            a = tl.load(x_tile + start)
            b = tl.load(w_tile + start)
        else:
            inside = start + step < K
            a = tl.load(x_tile + start, mask=inside[None, :], other=0.0)
            b = tl.load(w_tile + start, mask=inside[:, None], other=0.0)
        if INLINE:
            a, s = round_group(a, UE8M0)
        else:
            s = tl.load(x_scale + tl.cast(group, tl.int64) * pitch + token)
        total += multiply(a, b, WEIGHT_FIRST) * (s * tl.load(block_row + group))[:, None]
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    last = True
    if SPLITS > 1:
        size = tl.cast(M, tl.int64) * N
        tl.store(parts + part * size + at, total, mask=mask)
        last = is_last(counters, tile, SPLITS)
        if last:
            total = sum_parts(parts, at, mask, size, SPLITS)
    if last:
        if HAS_BIAS:
            total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)
