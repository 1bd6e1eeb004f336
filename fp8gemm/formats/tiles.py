"""The order of MXFP8 scales for cuBLAS: tiles of 128 rows by 4 scales, as Blackwell's tensor cores read them.

The scale of row r and group g is at byte ``(r % 32) * 16 + (r % 128 // 32) * 4 + g % 4`` of tile ``(r // 128,
g // 4)``; see the section on block scaling factors in the cuBLAS documentation.
"""

from __future__ import annotations

import torch

_ROWS, _GROUPS = 128, 4


def tiled_shape(rows: int, groups: int) -> tuple[int, int]:
    """The shape of ``tiled`` scales: both dimensions padded to whole tiles."""
    return -(-rows // _ROWS) * _ROWS, -(-groups // _GROUPS) * _GROUPS


def tiled(scale: torch.Tensor) -> torch.Tensor:
    """Scales ``[rows, groups]`` in tile order; padding is zero."""
    rows, groups = tiled_shape(*scale.shape)
    padded = torch.zeros(rows, groups, dtype=scale.dtype, device=scale.device)
    padded[: scale.shape[0], : scale.shape[1]] = scale
    tiles = padded.view(rows // _ROWS, 4, 32, groups // _GROUPS, _GROUPS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, groups)


def untiled(scale: torch.Tensor, *, rows: int, groups: int) -> torch.Tensor:
    """Undoes ``tiled``: the scales ``[rows, groups]`` without padding."""
    height, width = tiled_shape(rows, groups)
    tiles = scale.reshape(height // _ROWS, width // _GROUPS, 32, 4, _GROUPS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(height, width)[:rows, :groups]
