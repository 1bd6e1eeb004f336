"""The reference engine, which defines the right result: float32 or float64 products of the scheme's operands."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..numerics import dequantize, quantize
from ..scaled import GROUP_128, ScaledTensor
from .base import Engine, Machine, MatmulSpec, PackedWeight


class ReferenceEngine(Engine):
    """Quantizes activations exactly as the scheme says, dequantizes both operands, and multiplies them in float32.

    It is slow, so ``auto`` never chooses it. For float64 activations both operands are dequantized and multiplied in
    float64, where ``data * scale`` is exact.
    """

    name = "reference"
    traceable = True

    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        return []

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        w = dequantize(ScaledTensor(weight.data, weight.scale, weight.scheme.weight), wide)  # exact in float64
        y = F.linear(self.rounded(x, weight).to(wide), w, None if bias is None else bias.to(wide))
        return y.to(out_dtype)

    def rounded(self, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """``x [M, K]`` after the scheme's quantization and dequantization, in float32, or float64 for float64
        activations.

        Weight-only schemes leave it unchanged.
        """
        scheme = weight.scheme
        if scheme.activation is None:
            return x
        scale = weight.input_scale if scheme.static else None
        if scale is not None and scheme.activation == GROUP_128:
            raise ValueError("static activation scales must be per tensor or per row, found 1x128 groups")
        rounded = quantize(x, scheme.activation, scale=scale, scale_format=scheme.scale_format)
        return dequantize(rounded, torch.float64 if x.dtype == torch.float64 else torch.float32)
