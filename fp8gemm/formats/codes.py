"""Weights that are codes of another quantization than FP8: what a file's header tells about them."""

from __future__ import annotations

import torch

from .base import UE8M0_DTYPES, TensorInfo

# Integers that hold codes of weights; the indexes and tables of a model are int64.
_CODES = {
    torch.int8: "INT8",
    torch.uint8: "8-bit codes or packed values",
    torch.int16: "16-bit codes",
    torch.uint16: "16-bit codes",
    torch.int32: "packed integers",
    torch.uint32: "packed integers",
}


def is_codes(info: TensorInfo) -> bool:
    """Whether a tensor can be a matrix of codes, or several."""
    return info.dtype in _CODES and len(info.shape) >= 2


def described(key: str, info: TensorInfo, scale: TensorInfo | None) -> str:
    """Why the weight ``key`` cannot be read, with the quantization that it and its scale look like."""
    beside = "with a scale" if scale is not None else "without a known scale"
    return f"{key} is {info.dtype} {list(info.shape)} {beside}: not FP8 but {_name(info, scale)}"


def _name(info: TensorInfo, scale: TensorInfo | None) -> str:
    if scale is not None and info.dtype in (torch.int8, torch.uint8) and info.shape and scale.shape:
        if scale.dtype in UE8M0_DTYPES and scale.shape[-1] * 16 == info.shape[-1]:
            return "MXFP4 (two values a byte, a power of two for 32)"
        if scale.dtype == torch.float8_e4m3fn and scale.shape[-1] * 8 == info.shape[-1]:
            return "NVFP4 (two values a byte, an FP8 scale for 16)"
    return _CODES.get(info.dtype, "another quantization")
