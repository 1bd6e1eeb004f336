# mypy: ignore-errors
# Triton is untyped, and not installed everywhere.
"""Products of tokens sorted by expert with a stack of FP8 weights: no padding, no host synchronization, one launch.

Reference: ``Engine.grouped`` of the reference engine. A program finds its expert from the end offsets on the device;
the grid is sized for the worst case, and programs without a tile return at once. Tokens past the last end form tiles
of a nonexistent expert, which are zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...base import PackedWeight
from ..launch import divide_up, launch
from ..plan import Promotion
from ..replay import empty
from .block import multiply, round_group
from .parts import decode, format_of
from .row import multiply_add


def multiply_grouped(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: PackedWeight,
    ends: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    mode: str,
    native: bool,
    ue8m0: bool = False,
    promotion: Promotion = "none",
    weight_first: bool = False,
    block_m: int,
    block_n: int,
    block_k: int,
    warps: int,
    stages: int,
) -> torch.Tensor:
    """``x [T, K]`` times a stack ``[E, N, K]``; ``ends`` int32 ``[E]`` and ``bias [E, N]`` as in ``Engine.grouped``.

    Args:
        mode: ``"weight"`` does not quantize x; ``"row"`` takes e4m3 x with ``x_scale [T, 1]`` or ``[1, 1]``;
        ``"block"``
            quantizes groups of 128 features, or takes e4m3 x with M-major ``x_scale [T, K / 128]``.
        promotion: as in ``row``; block products move to float32 with their scales.
        weight_first: as in ``row``.
    """
    tokens, k = x.shape
    n, experts = weight.n, weight.experts
    y = empty(tokens, n, dtype=out_dtype, device=x.device)
    data, decoding = format_of(weight.data, native=native)
    granularity = weight.scheme.weight
    tiles_m = tokens // block_m + min(experts + 1, tokens)
    constants = {
        "EXPERTS": triton.next_power_of_2(experts + 1),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "MODE": mode,
        "SCALE_COLS": granularity.cols or 0,
        "INLINE": mode == "block" and x_scale is None,
        "X_STEP": int(x_scale is not None and x_scale.numel() > 1),
        "UE8M0": ue8m0,
        "EVEN_K": k % block_k == 0,
        "HAS_BIAS": bias is not None,
        "FORMAT": decoding,
        "PROMOTION": promotion if mode == "row" else "none",
        "WEIGHT_FIRST": weight_first and mode != "weight" and stages > 1,
    }
    scales, pitch = (weight.scale, 0) if x_scale is None else (x_scale, x_scale.stride(1))
    given = y if bias is None else bias
    scale_rows, scale_cols = weight.scale.shape[-2:]
    args = (x, data, scales, weight.scale, given, y, ends, tokens, n, k, experts, x.stride(0), pitch)
    args = (*args, granularity.rows or n, scale_cols, scale_rows * scale_cols, tiles_m)
    grid = (tiles_m * divide_up(n, block_n),)
    launch(grouped_kernel, grid, args, constants, num_warps=warps, num_stages=stages)
    return y


@triton.jit
def locate(ends, tile, tokens, E, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile, the tile's first token, and one past the expert's last; no such tile gives an expert >
    E."""
    slot = tl.arange(0, EXPERTS)
    end = tl.minimum(tl.load(ends + slot, mask=slot < E, other=tokens), tokens)
    start = tl.load(ends + slot - 1, mask=(slot > 0) & (slot <= E), other=0)
    start = tl.where(slot <= E, tl.minimum(start, tokens), end)
    count = (end - start + BLOCK_M - 1) // BLOCK_M
    through = tl.cumsum(count, 0)
    expert = tl.sum((through <= tile).to(tl.int32), 0)
    own = slot == expert
    first = tl.sum(tl.where(own, start + (tile - through + count) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(own, end, 0), 0)


@triton.jit(do_not_specialize=["tokens", "pitch", "tiles_m"])
def grouped_kernel(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    y,
    ends,
    tokens,
    N,
    K,
    E,
    x_stride,
    pitch,
    rows,
    scale_stride,
    scale_size,
    tiles_m,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MODE: tl.constexpr,
    SCALE_COLS: tl.constexpr,
    INLINE: tl.constexpr,
    X_STEP: tl.constexpr,
    UE8M0: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    PROMOTION: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
):
    # Neighboring programs share an expert's tile of w in the L2 cache.
    tile_m, tile_n = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    expert, first, limit = locate(ends, tile_m, tokens, E, EXPERTS, BLOCK_M)
    m = first + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner_n = tl.minimum(n, N - 1)
    token = tl.minimum(m, tl.maximum(limit - 1, 0)).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if expert < E:
        own = expert.to(tl.int64)
        step = tl.arange(0, BLOCK_K)
        w_row = w + own * N * K + inner_n.to(tl.int64) * K
        w_scales = w_scale + own * scale_size + (inner_n // rows).to(tl.int64) * scale_stride
        x_row = x + token * x_stride
        if MODE == "weight":
            total = tl.trans(
                _as_they_are(x_row, w_row, w_scales, step, K, BLOCK_M, BLOCK_N, BLOCK_K, SCALE_COLS, EVEN_K, FORMAT)
            )
        else:
            for start in range(0, K, BLOCK_K):
                if EVEN_K:
                    a = tl.load(x_row[:, None] + (start + step)[None, :])
                    b = tl.load(w_row[None, :] + (start + step)[:, None])
                else:
                    inside = start + step < K
                    a = tl.load(x_row[:, None] + (start + step)[None, :], mask=inside[None, :], other=0.0)
                    b = tl.load(w_row[None, :] + (start + step)[:, None], mask=inside[:, None], other=0.0)
                if MODE == "row":
                    total = multiply_add(a, b, total, PROMOTION, WEIGHT_FIRST)
                else:
                    if INLINE:
                        a, s = round_group(a, UE8M0)
                    else:
                        s = tl.load(x_scale + tl.cast(start // SCALE_COLS, tl.int64) * pitch + token)
                    total += (
                        multiply(a, b, WEIGHT_FIRST) * s[:, None] * tl.load(w_scales + start // SCALE_COLS)[None, :]
                    )
        if MODE == "row":
            total *= tl.load(x_scale + token * X_STEP)[:, None] * tl.load(w_scales)[None, :]
        if HAS_BIAS:
            total += tl.load(bias + own * N + inner_n).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(m < limit)[:, None] & (n < N)[None, :])


@triton.jit
def _as_they_are(
    x_row,
    w_row,
    w_scales,
    step,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALE_COLS: tl.constexpr,
    EVEN_K: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """``w @ x.T [BLOCK_N, BLOCK_M]`` with floating-point x, including scales."""
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            code = tl.load(w_row[:, None] + (start + step)[None, :])
            value = tl.load(x_row[None, :] + (start + step)[:, None])
        else:
            inside = start + step < K
            code = tl.load(w_row[:, None] + (start + step)[None, :], mask=inside[None, :], other=0.0)
            value = tl.load(x_row[None, :] + (start + step)[:, None], mask=inside[:, None], other=0.0)
        decoded = decode(code, value.dtype, FORMAT)
        if SCALE_COLS == 0:
            total = tl.dot(decoded, value, total, input_precision="ieee")
        else:
            s = tl.load(w_scales + start // SCALE_COLS)
            total += tl.dot(decoded, value, input_precision="ieee") * s[:, None]
    if SCALE_COLS == 0:
        total *= tl.load(w_scales)[:, None]
    return total
