"""torch's FP8 products as functions of quantized operands: cuBLASLt's, CUTLASS's and hipBLASLt's, with what each of
them needs."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from .base import PackedWeight, major_minor

ALIGNMENT = 16  # multiple of N and K for every operand on CUDA (torch's ScaledBlas.cpp)
FNUZ = torch.float8_e4m3fnuz
TORCH = major_minor(torch.__version__)


def rows_dtype(out_dtype: torch.dtype, *, bias: bool = False) -> torch.dtype:
    """The dtype to ask CUDA's row-wise products for; the additional rounding to bfloat16 is smaller than FP8's error.

    torch's CUTLASS kernels return 16-bit floats only, and before torch 2.14 write bfloat16's bits where float16 is
    asked for without a bias (RowwiseScaledMM.cu, pytorch#187569).
    """
    wrong = out_dtype == torch.float16 and not bias and TORCH < (2, 14)
    return torch.bfloat16 if wrong or out_dtype == torch.float32 else out_dtype


@cache
def multiplies_rows(device: torch.device) -> bool:
    """Whether torch's row-wise product runs on this accelerator; tries one.

    It is not built on Windows (RowwiseScaledMM.cu), and cuBLASLt has none for compute capability 12.0 in torch 2.10
    with CUDA 13.0 (pytorch#192707).
    """
    codes = torch.zeros(ALIGNMENT, ALIGNMENT, dtype=torch.uint8, device=device)
    codes = codes.view(FNUZ if takes_fnuz(device) else torch.float8_e4m3fn)
    ones = torch.ones(ALIGNMENT, 1, dtype=torch.float32, device=device)
    try:
        torch._scaled_mm(codes, codes.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def scaled_after(
    xq: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    one: torch.Tensor,
    fast: bool,
) -> torch.Tensor:
    """The float32 product ``[M, N]`` where torch has only tensor-wise ones: with scales of 1, and then scaled."""
    y = torch._scaled_mm(xq, w, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=fast)
    return y.mul_(x_scale).mul_(w_scale)


def multiply(
    xq: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    fast: bool,
) -> torch.Tensor:
    """An accelerator's product of e4m3 tokens and ``w [K, N]``: row-wise with scales ``[M, 1]`` and ``[1, N]``, or
    tensor-wise with one for each.

    cuBLASLt adds 16-bit biases to 16-bit results only.
    """
    by_row = x_scale.numel() > 1 or w_scale.numel() > 1
    asked = rows_dtype(out_dtype, bias=bias is not None) if by_row else out_dtype
    y = torch._scaled_mm(xq, w, scale_a=x_scale, scale_b=w_scale, bias=bias, out_dtype=asked, use_fast_accum=fast)
    return y.to(out_dtype)


def multiply_blocks(xq: torch.Tensor, w: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """torch's product (cuBLASLt, always precise) of e4m3 tokens and ``w [K, N]``, with scales in its layout;
    bfloat16."""
    return F.scaled_mm(
        xq,
        w,
        scale_a=x_scale,
        scale_recipe_a=F.ScalingType.BlockWise1x128,
        scale_b=w_scale,
        scale_recipe_b=F.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def multiply_grouped(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    stack: tuple[torch.Tensor, torch.Tensor],
    weight: PackedWeight,
    ends: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """torch's product of e4m3 tokens ``[T, K]`` and ``stack``: weights ``[E, K, N]`` and scales ``[E, N]``."""
    w, w_scale = stack
    y = torch._scaled_grouped_mm(
        xq, w, x_scale.reshape(-1), w_scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=weight.fast
    )[:, : weight.n]
    token = torch.arange(xq.shape[0], device=xq.device, dtype=ends.dtype)
    if bias is not None:
        expert = torch.searchsorted(ends, token, right=True).clamp_(max=weight.experts - 1)
        y = y + bias[expert].to(y.dtype)
    # torch does not write rows past the last end.
    return torch.where((token < ends[-1]).unsqueeze(1), y, 0).to(out_dtype)


@cache
def takes_fnuz(device: torch.device) -> bool:
    """Whether the device is AMD's gfx942 (MI300), which multiplies e4m3fnuz only; queries the driver once."""
    if device.type != "cuda" or torch.version.hip is None:
        return False
    return str(torch.cuda.get_device_properties(device).gcnArchName).startswith("gfx942")


def to_fnuz(data: torch.Tensor) -> torch.Tensor:
    """e4m3fn codes reinterpreted as e4m3fnuz, where they mean half the value: the scale doubles, exactly.

    e4m3fnuz has an exponent bias of 8 instead of 7, a single zero, and a single NaN, whose code is e4m3fn's -0.
    """
    code = data.view(torch.uint8)
    positive = torch.where(code == 0x80, 0, code)
    return torch.where(code & 0x7F == 0x7F, 0x80, positive).view(FNUZ)


def from_fnuz(data: torch.Tensor) -> torch.Tensor:
    """The e4m3fn codes before ``to_fnuz``; -0 and the negative NaN come back as 0 and NaN."""
    code = data.view(torch.uint8)
    return torch.where(code == 0x80, 0x7F, code).view(torch.float8_e4m3fn)


def block_scales(scale: torch.Tensor) -> torch.Tensor:
    """Scales ``[..., N/128, K/128]`` in cuBLASLt's layout: ``[K/128 rounded up to 4, N/128]``, columns contiguous."""
    more = -scale.shape[-1] % 4
    return (F.pad(scale, (0, more)) if more else scale).transpose(-2, -1)
