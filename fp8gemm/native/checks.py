"""Checks of operands before they are passed to C by address: each mistake is named, with what was found."""

from __future__ import annotations

import torch

from .memory import plain

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def _grid(n: int, k: int, rows: int, cols: int) -> tuple[int, int]:
    return -(-max(n, 1) // rows), -(-max(k, 1) // cols)


def mistakes(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    rows: int,
    cols: int,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> list[str]:
    """All mismatches between the operands of ``linear``, or of ``grouped`` if ``data`` has three dimensions."""
    if rows < 1 or cols < 1:
        return [f"rows and cols must be at least 1, found {rows} and {cols}"]
    if x.dim() != 2 or data.dim() not in (2, 3):
        return [f"x must be [M, K] and data [N, K] or [E, N, K], found {describe(x)} and {describe(data)}"]
    (m, k), (*experts, n) = x.shape, data.shape[:-1]
    grid = (*experts, *_grid(n, k, rows, cols))
    wrong = []
    if x.dtype not in TYPES or not rows_are_dense(x) or away(x):
        wrong.append(f"x must be bfloat16, float16 or float32 with unit stride along K on cpu, found {describe(x)}")
    if data.dtype != torch.float8_e4m3fn or data.shape[-1] != k or not rows_are_dense(data) or away(data):
        wrong.append(f"data must be float8_e4m3fn [..., {k}] with unit stride along K on cpu, found {describe(data)}")
    if scale.dtype != torch.float32 or tuple(scale.shape) != grid or not scale.is_contiguous() or away(scale):
        wrong.append(f"scale must be contiguous float32 {list(grid)} on cpu, found {describe(scale)}")
    kinds = (x.dtype, torch.float32)
    if bias is not None and (
        bias.dtype not in kinds or tuple(bias.shape) != (*experts, n) or not bias.is_contiguous() or away(bias)
    ):
        wrong.append(f"bias must be contiguous {x.dtype} or float32 {[*experts, n]} on cpu, found {describe(bias)}")
    dense = rows_are_dense(out) and (m <= 1 or out.stride(0) >= n)
    if out.dtype not in kinds or tuple(out.shape) != (m, n) or not dense or away(out):
        wrong.append(
            f"out must be {x.dtype} or float32 {[m, n]} with unit stride along N on cpu, found {describe(out)}"
        )
    return wrong


def quantize_mistakes(
    x: torch.Tensor, rows: int, cols: int, data_out: torch.Tensor, scale_out: torch.Tensor
) -> list[str]:
    if rows < 1 or cols < 1:
        return [f"rows and cols must be at least 1, found {rows} and {cols}"]
    if x.dim() != 2 or x.dtype not in TYPES or not rows_are_dense(x) or away(x):
        return [f"x must be bfloat16, float16 or float32 [N, K] with unit stride along K on cpu, found {describe(x)}"]
    n, k = x.shape
    grid = _grid(n, k, rows, cols)
    wrong = []
    kinds = (torch.float8_e4m3fn, torch.uint8)
    dense = rows_are_dense(data_out) and (n <= 1 or data_out.stride(0) >= k)
    if data_out.dtype not in kinds or data_out.shape != x.shape or not dense or away(data_out):
        wrong.append(f"data_out must be float8_e4m3fn or uint8 {[n, k]} on cpu, found {describe(data_out)}")
    fits = scale_out.dtype == torch.float32 and tuple(scale_out.shape) == grid and scale_out.is_contiguous()
    if not fits or away(scale_out):
        wrong.append(f"scale_out must be contiguous float32 {list(grid)} on cpu, found {describe(scale_out)}")
    return wrong


def rows_are_dense(tensor: torch.Tensor) -> bool:
    """Whether rows have the strides that the kernels need; an empty tensor always does, as nothing is read."""
    return tensor.numel() == 0 or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1


def away(tensor: torch.Tensor) -> bool:
    """Whether a tensor is not in this process's memory: it is on another device, or has no memory of its own."""
    return tensor.device.type != "cpu" or not plain(tensor)


def describe(tensor: torch.Tensor) -> str:
    kind = "" if type(tensor) in (torch.Tensor, torch.nn.Parameter) else f"{type(tensor).__name__}, "
    return f"{kind}{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
