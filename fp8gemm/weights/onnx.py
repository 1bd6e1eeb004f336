"""Weights in models that ``torch.onnx.export(dynamo=True)`` writes: FP8 bytes that the graph dequantizes.

ONNX has no product of FP8 matrices. Its DequantizeLinear takes e4m3 and e5m2 bytes from opset 19 on, with a scale for
the tensor or for each row; scales of blocks need opset 21, which torch does not write by default: those are multiplied
by Mul.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..engines import PackedWeight, restore
from ..scaled import ScaledTensor


def onnx_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """``y [M, N] = x [M, K] @ w.T + bias`` in the graph; activations are not rounded, whatever the scheme."""
    w = _in_graph(restore(weight)).to(x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype)).to(out_dtype)


def _in_graph(weight: ScaledTensor) -> torch.Tensor:
    """``weight [N, K]`` in float32."""
    n, k = weight.shape
    rows, cols = weight.granularity.block((n, k))
    if cols < k:
        return _by_blocks(weight.data, weight.scale, rows, cols)
    per_row = rows < n
    scale = weight.scale[:, 0].repeat_interleave(rows)[:n] if per_row else weight.scale.reshape(())
    attributes: dict[str, int] = {"axis": 0} if per_row else {}
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (weight.data, scale),
        attributes,  # type: ignore[arg-type]
        dtype=torch.float32,
        shape=(n, k),
        version=19,
    )


def _by_blocks(data: torch.Tensor, scale: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """``data [N, K]`` times ``scale [ceil(N / rows), ceil(K / cols)]``, without a tensor of repeated scales."""
    (n, k), (down, across) = data.shape, scale.shape
    values = data.to(torch.float32)
    if (n, k) != (down * rows, across * cols):
        values = F.pad(values, (0, across * cols - k, 0, down * rows - n))
    values = values.view(down, rows, across, cols) * scale.view(down, 1, across, 1)
    return values.view(down * rows, across * cols)[:n, :k]
