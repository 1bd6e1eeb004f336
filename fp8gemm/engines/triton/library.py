"""torch's FP8 products (cuBLASLt and CUTLASS) after fp8gemm's quantization kernels, for shapes where they are
fastest."""

from __future__ import annotations

import torch

from ...numerics import expand_scale
from ...scaled import ScaledTensor
from .. import scaled_mm
from ..activations import TOKENS_TOGETHER, group_scales
from ..base import PackedWeight
from ..padding import padded


def multiply_rows(
    xq: torch.Tensor, x_scale: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """torch's product of operands that are quantized already; N and K must be multiples of 16.

    Tensor-wise if both have one scale, else row-wise, with x_scale ``[M, 1]``, or ``[1, 1]``, which is repeated.
    """
    from . import replay

    w, w_scale = weight.extra["w"], weight.extra["w_scale"]
    if x_scale.numel() == weight.scale.numel() == 1:
        w_scale = weight.scale
    elif x_scale.numel() != xq.shape[0]:
        x_scale = x_scale.expand(xq.shape[0], 1).contiguous()
    fused = bias if bias is not None and bias.dtype == out_dtype != torch.float32 else None
    y: torch.Tensor = replay.call(scaled_mm.multiply, xq, w, x_scale, w_scale, fused, out_dtype, weight.fast)
    return y if bias is None or fused is not None else y + bias.to(out_dtype)


def multiply_blocks(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    m: int,
) -> torch.Tensor:
    """torch's 1x128 by 128x128 product of ``m`` tokens; cuBLASLt needs a multiple of 4 (vllm#49932)."""
    from . import replay

    if xq.shape[0] % TOKENS_TOGETHER:
        xq, x_scale = padded(xq, TOKENS_TOGETHER, 1), group_scales(x_scale, TOKENS_TOGETHER)
    w, w_scale = weight.extra["w"], weight.extra["w_scale"]
    y: torch.Tensor = replay.call(scaled_mm.multiply_blocks, xq, w, x_scale, w_scale)
    y = y[:m].to(out_dtype)
    return y if bias is None else y + bias.to(out_dtype)


def operands(weight: ScaledTensor) -> dict[str, torch.Tensor]:
    """A weight and its scales as torch's products need them, as views.

    ``w`` is the transposed weight ``[K, N]``; ``w_scale`` is ``[1, N]`` or ``[K/128 rounded up to 4, N/128]``. Stacks
    have the experts as an additional first dimension.
    """
    w = weight.data.transpose(-2, -1)
    if weight.granularity.cols is not None:
        return {"w": w, "w_scale": scaled_mm.block_scales(weight.scale)}
    scale = expand_scale(weight.scale, weight.granularity, weight.shape)
    return {"w": w, "w_scale": scale.expand(*weight.shape[:-1], 1).contiguous().transpose(-2, -1)}
