"""torch's FP8 products (cuBLASLt and CUTLASS) after fp8gemm's quantization kernels, for shapes where they are
fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...numerics import expand_scale
from ...scaled import ScaledTensor
from .. import torch_mm
from ..base import PackedWeight


def multiply_rows(
    xq: torch.Tensor, x_scale: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """torch's row-wise product of operands that are quantized already; N and K must be multiples of 16."""
    from . import replay

    w, w_scale = weight.extra["w"], weight.extra["w_scale"]
    if x_scale.numel() != xq.shape[0]:
        x_scale = x_scale.expand(xq.shape[0], 1).contiguous()
    fused = bias if bias is not None and bias.dtype == out_dtype else None
    y: torch.Tensor = replay.call(torch_mm.multiply_rows, xq, w, x_scale, w_scale, fused, out_dtype, weight.fast)
    return y if bias is None or fused is not None else y + bias.to(out_dtype)


def multiply_blocks(
    xq: torch.Tensor, x_scale: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """torch's 1x128 by 128x128 product for any number of tokens; cuBLASLt needs a multiple of 4 (vllm#49932)."""
    from . import replay

    w, w_scale = weight.extra["w"], weight.extra["w_scale"]
    m = xq.shape[0]
    if m % 4:
        xq = F.pad(xq.view(torch.uint8), (0, 0, 0, -m % 4)).view(xq.dtype)
        x_scale = F.pad(x_scale.t(), (0, -m % 4)).t()
    y: torch.Tensor = replay.call(torch_mm.multiply_blocks, xq, w, x_scale, w_scale)
    y = (y[:m] if m % 4 else y).to(out_dtype)
    return y if bias is None else y + bias.to(out_dtype)


def operands(weight: ScaledTensor) -> dict[str, torch.Tensor]:
    """A weight and its scales as torch's products need them, as views.

    ``w`` is the transposed weight ``[K, N]``; ``w_scale`` is ``[1, N]`` or ``[K/128 rounded up to 4, N/128]``. Stacks
    have the experts as an additional first dimension.
    """
    w = weight.data.transpose(-2, -1)
    if weight.granularity.cols is not None:
        return {"w": w, "w_scale": torch_mm.block_scales(weight.scale)}
    scale = expand_scale(weight.scale, weight.granularity, weight.shape)
    return {"w": w, "w_scale": scale.expand(*weight.shape[:-1], 1).contiguous().transpose(-2, -1)}
