"""Quantizing a weight with a compiled kernel, or else in parts, so that the peak memory stays close to the result's."""

from __future__ import annotations

import torch

from .. import native
from ..numerics import block_scale, quantize
from ..scaled import Granularity, ScaledTensor, ScaleFormat

_PART_ELEMENTS = 2**19  # elements of one part: 2 MiB in float32, and a few temporaries of that size


def quantize_weight(
    w: torch.Tensor,
    granularity: Granularity,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: ScaleFormat = "float32",
    device: torch.device | str | None = None,
) -> ScaledTensor:
    """``quantize(w [N, K])`` with the same bits, on ``device``, in parts; needs little memory besides the result."""
    device = w.device if device is None else torch.device(device)
    n, k = w.shape
    compiled = _compiled(w, device, dtype)
    if compiled is not None:
        scaled = _empty(w.shape, granularity)
        compiled.quantize(w, *granularity.block(w.shape), scaled.data, scaled.scale, ue8m0=scale_format == "ue8m0")
        return scaled
    if n == 0:
        return quantize(w.to(device), granularity, dtype=dtype, scale_format=scale_format)
    rows, _ = granularity.block(w.shape)
    part = rows if granularity.rows is None else max(1, _PART_ELEMENTS // (rows * max(k, 1))) * rows
    scale = None
    if granularity.rows is None:
        # One scale spans all rows, so its amax is found in parts too.
        part = max(1, _PART_ELEMENTS // max(k, 1))
        pieces = (piece.to(device) for piece in torch.split(w, part))
        amounts = [block_scale(piece, granularity, dtype=dtype, scale_format=scale_format) for piece in pieces]
        scale = torch.stack(amounts).amax(dim=0)
    data = torch.empty(n, k, dtype=dtype, device=device)
    scales = []
    for start in range(0, n, part):
        piece = w[start : start + part].to(device)
        scaled = quantize(piece, granularity, dtype=dtype, scale=scale, scale_format=scale_format)
        data[start : start + part] = scaled.data
        scales.append(scaled.scale)
    return ScaledTensor(data, scale if scale is not None else torch.cat(scales), granularity)


def _compiled(w: torch.Tensor, device: torch.device, dtype: torch.dtype) -> native.Library | None:
    """The compiled quantizer, if it supports this weight: the same bits, about ten times as fast."""
    fits = w.dtype in native.TYPES and dtype == torch.float8_e4m3fn and (w.stride(-1) == 1 or w.shape[-1] <= 1)
    if device.type != "cpu" or w.device.type != "cpu" or not fits or w.requires_grad or not native.plain(w):
        return None
    return native.loaded()


def _empty(shape: torch.Size, granularity: Granularity) -> ScaledTensor:
    return ScaledTensor(
        torch.empty(shape, dtype=torch.float8_e4m3fn, device="cpu"),
        torch.empty(granularity.scale_shape(shape), dtype=torch.float32, device="cpu"),
        granularity,
    )
