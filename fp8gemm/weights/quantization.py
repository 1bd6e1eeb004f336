"""Quantizing a weight with a compiled kernel, or else in parts, so that the peak memory stays close to the result's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .. import native
from ..numerics import block_scale, candidate_scales, quantize, rounding_error, search_scale
from ..scaled import Granularity, ScaledTensor, ScaleFormat

_PART_ELEMENTS = 2**19  # elements of one part: 2 MiB in float32, and a few temporaries of that size
_SEARCH_ELEMENTS = 2**16  # of one part of a search, which passes over it some hundred times: they stay in the cache


def quantize_weight(
    w: torch.Tensor,
    granularity: Granularity,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: ScaleFormat = "float32",
    device: torch.device | str | None = None,
    scale: torch.Tensor | None = None,
) -> ScaledTensor:
    """``quantize(w [N, K])`` with the same bits, on ``device``, in parts; needs little memory besides the result."""
    device = w.device if device is None else torch.device(device)
    n, k = w.shape
    compiled = _compiled(w, device, dtype) if scale is None else None
    if compiled is not None:
        scaled = _empty(w.shape, granularity)
        compiled.quantize(w, *granularity.block(w.shape), scaled.data, scaled.scale, ue8m0=scale_format == "ue8m0")
        return scaled
    if n == 0:
        return quantize(w.to(device), granularity, dtype=dtype, scale=scale, scale_format=scale_format)
    if scale is None and granularity.rows is None:  # one scale spans all rows, so its amax is found in parts, too
        pieces = (w[rows].to(device) for rows, _ in _parts(w, granularity, _PART_ELEMENTS))
        amounts = [block_scale(piece, granularity, dtype=dtype, scale_format=scale_format) for piece in pieces]
        scale = torch.stack(amounts).amax(dim=0)
    data = torch.empty(n, k, dtype=dtype, device=device)
    scales = []
    for rows, blocks in _parts(w, granularity, _PART_ELEMENTS):
        own = None if scale is None else scale[blocks]
        scaled = quantize(w[rows].to(device), granularity, dtype=dtype, scale=own, scale_format=scale_format)
        data[rows] = scaled.data
        scales.append(scaled.scale)
    return ScaledTensor(data, scale if scale is not None else torch.cat(scales), granularity)


def searched_scale(
    w: torch.Tensor,
    granularity: Granularity,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: ScaleFormat = "float32",
    device: torch.device | str | None = None,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """``search_scale(w [N, K])`` on ``device``, in parts; errors of blocks that span parts are added up in another
    order."""
    device = w.device if device is None else torch.device(device)
    pieces = (w[rows].to(device) for rows, _ in _parts(w, granularity, _SEARCH_ELEMENTS))
    if granularity.rows is not None:
        form: dict[str, Any] = {"dtype": dtype, "scale_format": scale_format, "importance": importance}
        return torch.cat([search_scale(piece, granularity, **form) for piece in pieces])
    amounts = [block_scale(piece, granularity, dtype=dtype, scale_format=scale_format) for piece in pieces]
    candidates = candidate_scales(torch.stack(amounts).amax(dim=0), scale_format)
    errors = torch.zeros(len(candidates), *candidates[0].shape, dtype=torch.float64, device=device)
    for rows, _ in _parts(w, granularity, _SEARCH_ELEMENTS):
        piece = w[rows].to(device)
        for error, scale in zip(errors, candidates, strict=True):
            error += rounding_error(piece, scale, granularity, dtype=dtype, importance=importance)
    return torch.stack(candidates).gather(0, errors.argmin(dim=0, keepdim=True))[0]


def _parts(w: torch.Tensor, granularity: Granularity, elements: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of rows of ``w [N, K]`` with about that many elements, and the ranges of their blocks."""
    n, k = w.shape
    rows = granularity.rows or 1
    part = max(1, elements // (rows * max(k, 1))) * rows
    for start in range(0, n, part):
        blocks = slice(None) if granularity.rows is None else slice(start // rows, -(-min(start + part, n) // rows))
        yield slice(start, start + part), blocks


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
