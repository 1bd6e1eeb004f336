"""Padding operands to the sizes that libraries' kernels take, and back; nothing is copied where nothing is missing."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..scaled import FP8_DTYPES
from .base import PackedWeight


def padded(data: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """FP8 codes ``[..., N, K]``, contiguous, padded with zeros to multiples of ``rows`` and ``cols``."""
    n, k = data.shape[-2:]
    if n % rows == 0 and k % cols == 0:
        return data.contiguous()
    return F.pad(data.view(torch.uint8), (0, -k % cols, 0, -n % rows)).view(data.dtype)


def padded_scale(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """Row scales ``[..., N, 1]`` with ones below up to a multiple of ``rows``."""
    more = -scale.shape[-2] % rows
    return F.pad(scale, (0, 0, 0, more), value=1.0) if more else scale


def widened(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Tokens, or their FP8 codes, ``[M, K]`` with zeros beside up to the K of the padded weight."""
    more = weight.data.shape[-1] - weight.k
    if not more:
        return x
    return F.pad(x.view(torch.uint8) if x.dtype in FP8_DTYPES else x, (0, more)).view(x.dtype)


def cropped(packed: PackedWeight) -> torch.Tensor:
    """The codes ``[..., n, k]`` without the padding of ``padded``."""
    return packed.data[..., : packed.n, : packed.k].contiguous()
