"""Dequantizing a whole matrix or some of its rows, by a compiled kernel where there is one."""

from __future__ import annotations

import torch

from .. import native
from ..engines import ENGINES
from ..numerics import dequantize
from ..scaled import Granularity, ScaledTensor


def dequantized(weight: ScaledTensor, dtype: torch.dtype) -> torch.Tensor:
    """``dequantize(weight [..., N, K])``, with the same bits."""
    library = _compiled(weight, dtype)
    if library is None or weight.data.dim() != 2:
        return dequantize(weight, dtype)
    return library.lookup(weight.data, weight.scale, *weight.granularity.block(weight.shape), None, dtype)


def rows_of(weight: ScaledTensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``ids`` (of any shape) of ``weight [N, K]``, dequantized: ``[*ids.shape, K]``. Reads only those rows.

    Raises:
        IndexError: an id is out of range.
    """
    flat = ids.reshape(-1)
    found = _looked_up(weight, flat, dtype)
    if found is None:
        block = weight.granularity.block(weight.shape)[0]
        data = weight.data.view(torch.uint8).index_select(0, flat).view(weight.data.dtype)
        scale = weight.scale.index_select(0, torch.div(flat, block, rounding_mode="floor"))
        found = dequantize(ScaledTensor(data, scale, Granularity(1, weight.granularity.cols)), dtype)
    return found.view(*ids.shape, weight.shape[1])


def _looked_up(weight: ScaledTensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The same by one kernel; None where there is none for this device."""
    if (library := _compiled(weight, dtype, ids)) is not None:
        flat = ids.to(torch.int64).contiguous()
        return library.lookup(weight.data, weight.scale, *weight.granularity.block(weight.shape), flat, dtype)
    on_card = weight.device.type == "cuda" and weight.data.is_contiguous() and weight.scale.is_contiguous()
    if not on_card or torch.compiler.is_compiling() or not native.plain(weight.data, weight.scale, ids):
        return None
    if torch.cuda.is_current_stream_capturing() or not ids.numel():
        return None  # a kernel cannot be compiled during graph capture
    return ENGINES["triton"].look_up(weight, ids.contiguous(), dtype)


def _compiled(weight: ScaledTensor, dtype: torch.dtype, *others: torch.Tensor) -> native.Library | None:
    """The library of compiled kernels; None if there is none or it does not support these tensors."""
    data, scale = weight.data, weight.scale
    takes = data.dtype == torch.float8_e4m3fn and dtype in native.TYPES and data.device.type == "cpu"
    lies = (data.stride(-1) == 1 or data.shape[-1] <= 1) and scale.is_contiguous() and scale.dtype == torch.float32
    if not takes or not lies or torch.compiler.is_compiling() or not native.plain(data, scale, *others):
        return None
    if any(other.device.type != "cpu" for other in others) or data.numel() == 0:
        return None
    return native.loaded()
