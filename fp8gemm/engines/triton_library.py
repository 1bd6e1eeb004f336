"""torch's own FP8 products behind our quantization kernels: cuBLASLt and CUTLASS where they are hard to beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..quantize import expand_scale
from ..scaled import ScaledTensor
from .base import Prepared


def multiply_rows(
    xq: torch.Tensor,
    scale: torch.Tensor,
    weight: Prepared,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    fast: bool,
) -> torch.Tensor:
    """torch's row-wise product of operands that are quantized already; N and K are multiples of 16."""
    (w_scale,) = weight.extra
    x_scale = scale if scale.numel() == xq.shape[0] else scale.expand(xq.shape[0], 1).contiguous()
    fused = bias if bias is not None and bias.dtype == out_dtype else None
    y = torch._scaled_mm(
        xq, weight.data.t(), x_scale, w_scale.t(), bias=fused, out_dtype=out_dtype, use_fast_accum=fast
    )
    return y if bias is None or fused is not None else y + bias.to(out_dtype)


def multiply_blocks(
    xq: torch.Tensor,
    scale: torch.Tensor,
    weight: Prepared,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    fast: bool,
) -> torch.Tensor:
    """torch's 1x128 by 128x128 product (cuBLASLt, always precise), as ``TorchEngine`` calls it; M % 4 is 0."""
    (w_scale,) = weight.extra
    y = F.scaled_mm(
        xq,
        weight.data.t(),
        scale_a=scale,
        scale_recipe_a=F.ScalingType.BlockWise1x128,
        scale_b=w_scale.t(),
        scale_recipe_b=F.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return y.to(out_dtype) if bias is None else y.to(out_dtype) + bias.to(out_dtype)


def library_scale(weight: ScaledTensor) -> torch.Tensor:
    """Scales as torch's products read them: ``[N, 1]``, or ``[N/128, K/128 rounded up to 4]`` for cuBLASLt."""
    if weight.granularity.cols is not None:
        return F.pad(weight.scale, (0, -weight.scale.shape[-1] % 4))
    scale = expand_scale(weight.scale, weight.granularity, weight.shape)
    return scale.expand(weight.shape[-2], 1).contiguous()
