# mypy: ignore-errors
# Triton is untyped, and not installed everywhere.
"""Quantizing activations to e4m3 in one pass: per row, or per group along K with scales stored M-major.

``fp8gemm.numerics.quantize`` is the reference of every kernel here, bit for bit. If ``up`` is given, the input is
``silu(x) * up`` in float32, as for the second product of a gated MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ....numerics import SCALE_FLOOR
from ..launch import divide_up, launch
from ..replay import empty

_FLOOR = tl.constexpr(SCALE_FLOOR)
LARGEST = torch.finfo(torch.float8_e4m3fn).max
_LARGEST = tl.constexpr(LARGEST)

# The longest row that fits into the registers of 16 warps without spills (compiled for sm_90, Triton 3.6; half of it if
# two rows are read); a longer row is read twice, in steps.
LONGEST_ROW = 32768
STEP = 8192


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How activations are quantized, apart from the granularity.

    ``static`` is a float32 scale for all of them; ``ue8m0`` rounds scales up to powers of two.
    """

    static: torch.Tensor | None = None
    ue8m0: bool = False


PLAIN = Rounding()


def quantize_rows(
    x: torch.Tensor, rounding: Rounding = PLAIN, *, up: torch.Tensor | None = None, repeated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [M, K]`` with unit stride along K to e4m3 ``[M, K]`` and float32 scales ``[M, 1]`` (static: ``[1, 1]``).

    ``repeated`` repeats a static scale for each row, ``[M, 1]``, as torch's row-wise product needs it.
    """
    m, k = x.shape
    y = empty(m, k, dtype=torch.float8_e4m3fn, device=x.device)
    static = rounding.static
    stores = static is None or repeated
    scale = empty(m, 1, dtype=torch.float32, device=x.device) if stores else static.reshape(1, 1)
    if m == 0 or k == 0:
        return y, scale.fill_(SCALE_FLOOR) if static is None else static.reshape(1, 1).expand(scale.shape)
    longest = LONGEST_ROW // (1 if up is None else 2)
    block = max(triton.next_power_of_2(k), 16) if k <= longest else min(STEP, longest)
    held = block * (1 if up is None else 2)  # by a row; more a thread spill on sm_120, under Triton 3.6 or 3.9
    rows = min(32, max(1, 1024 // held)) if m >= 1024 else 1
    constants = {
        "ROWS": rows,
        "BLOCK_K": block,
        "ONE_PASS": k <= block,
        "STATIC": static is not None,
        "STORES": stores,
        "UE8M0": rounding.ue8m0,
        "GATED": up is not None,
    }
    second = x if up is None else up
    given = scale if static is None else static
    args = (x, second, y, scale, given, m, k, x.stride(0), second.stride(0))
    warps = 4 if held <= 4096 else 8 if held <= 8192 else 16
    launch(row_kernel, (divide_up(m, rows),), args, constants, num_warps=warps)
    return y, scale


def quantize_groups(
    x: torch.Tensor,
    rounding: Rounding = PLAIN,
    *,
    up: torch.Tensor | None = None,
    group: int = 128,
    multiple: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [M, K]`` to e4m3 ``[M, K]`` and float32 scales ``[M, K / group]`` with strides (1, M rounded up to 4).

    cuBLASLt, DeepGEMM and the block kernel read this layout without a transpose. In both results M is rounded up to a
    ``multiple`` of 1, 2 or 4; rows past M are undefined.
    """
    m, k = x.shape
    rows = multiple * divide_up(m, multiple)
    y = empty(rows, k, dtype=torch.float8_e4m3fn, device=x.device)
    groups, pitch = divide_up(k, group), 4 * divide_up(m, 4)
    scale = empty(groups, pitch, dtype=torch.float32, device=x.device)
    if m and k:
        across = min(8, triton.next_power_of_2(groups))
        constants = {
            "ROWS": 4,
            "GROUPS": across,
            "GROUP": group,
            "UE8M0": rounding.ue8m0,
            "GATED": up is not None,
        }
        grid = (divide_up(m, 4), divide_up(groups, across))
        second = x if up is None else up
        args = (x, second, y, scale, m, k, x.stride(0), second.stride(0), pitch)
        launch(group_kernel, grid, args, constants, num_warps=4)
    return y, scale.t()[:rows]


@triton.jit
def finite(value):
    return tl.abs(value) < float("inf")


@triton.jit
def scale_of(amax, UE8M0: tl.constexpr):
    """``max(amax, smallest) / 448``, as in ``fp8gemm.numerics.block_scale``."""
    scale = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, _LARGEST, tl.float32)), _FLOOR)
    if UE8M0:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def encode(value, scale, dtype: tl.constexpr):
    """``value / scale`` rounded to ``dtype``, saturating; non-finite values become NaN.

    Multiplies by a reciprocal shared by all values of a scale and corrects by the remainder, which rounds like a
    division (Markstein, 1990) in 3 instructions per element, where ``div_rn`` takes about 15. Values are clamped first,
    so that no quotient overflows; clamping turns NaN into numbers, so NaN is restored at the end.
    """
    reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    bound = scale * _LARGEST
    inside = tl.minimum(tl.maximum(value, -bound), bound)
    quotient = inside * reciprocal
    quotient = tl.fma(tl.fma(-quotient, scale, inside), reciprocal, quotient)
    return tl.where(finite(value), quotient, float("nan")).to(dtype)


@triton.jit
def load_values(x, up, row, x_stride, up_stride, k, mask, GATED: tl.constexpr):
    """A float32 tile of ``x``, or of ``silu(x) * up``."""
    value = tl.load(x + row * x_stride + k, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        value = tl.div_rn(value, 1.0 + tl.exp(-value))
        value *= tl.load(up + row * up_stride + k, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["M"])
def row_kernel(
    x,
    up,
    y,
    scale,
    static,
    M,
    K,
    x_stride,
    up_stride,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_PASS: tl.constexpr,
    STATIC: tl.constexpr,
    STORES: tl.constexpr,
    UE8M0: tl.constexpr,
    GATED: tl.constexpr,
):
    # 64 bits: M * K may exceed 2**31.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = row < M
    if ONE_PASS:
        value = load_values(x, up, row, x_stride, up_stride, k, inside & (k < K), GATED)
        if STATIC:
            s = tl.load(static) + tl.zeros((ROWS, 1), tl.float32)
        else:
            amax = tl.max(tl.where(finite(value), tl.abs(value), 0.0), axis=1)
            s = scale_of(amax, UE8M0)[:, None]
        if STORES:
            tl.store(scale + row, s, mask=inside)
        tl.store(y + row * K + k, encode(value, s, y.dtype.element_ty), mask=inside & (k < K))
    else:
        if STATIC:
            s = tl.load(static) + tl.zeros((ROWS, 1), tl.float32)
        else:
            amax = tl.zeros((ROWS,), tl.float32)
            for start in range(0, K, BLOCK_K):
                value = load_values(x, up, row, x_stride, up_stride, start + k, inside & (start + k < K), GATED)
                amax = tl.maximum(amax, tl.max(tl.where(finite(value), tl.abs(value), 0.0), axis=1))
            s = scale_of(amax, UE8M0)[:, None]
        if STORES:
            tl.store(scale + row, s, mask=inside)
        for start in range(0, K, BLOCK_K):
            mask = inside & (start + k < K)
            value = load_values(x, up, row, x_stride, up_stride, start + k, mask, GATED)
            tl.store(y + row * K + start + k, encode(value, s, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "pitch"])
def group_kernel(
    x,
    up,
    y,
    scale,
    M,
    K,
    x_stride,
    up_stride,
    pitch,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    UE8M0: tl.constexpr,
    GATED: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k = group[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    mask = (row < M)[:, None, None] & (k < K)
    value = load_values(x, up, row[:, None, None], x_stride, up_stride, k, mask, GATED)
    amax = tl.max(tl.where(finite(value), tl.abs(value), 0.0), axis=2)
    s = scale_of(amax, UE8M0)
    at = tl.cast(group, tl.int64)[None, :] * pitch + row[:, None]
    tl.store(scale + at, s, mask=(row < M)[:, None] & (group * GROUP < K)[None, :])
    tl.store(y + row[:, None, None] * K + k, encode(value, s[:, :, None], y.dtype.element_ty), mask=mask)
