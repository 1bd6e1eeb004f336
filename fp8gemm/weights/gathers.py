"""Rows and experts taken by index: lookups in an embedding, and the experts of each token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .. import native
from .chosen import ChosenExperts
from .dispatch import FUNCTIONS, OPERATIONS, implements
from .geometry import Part
from .lookup import rows_of
from .product import in_forward_mode
from .watching import exporting_to_onnx, jit_tracing
from .weight import FP8Weight

aten = torch.ops.aten


@implements(FUNCTIONS, F.embedding)
def _embedding_directly(
    input: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, *others: Any, **more: Any
) -> Any:
    """A shortcut past the dispatcher, where nothing else intercepts the call."""
    alone = isinstance(input, torch.Tensor) and not torch.compiler.is_compiling() and native.plain(input)
    if not isinstance(weight, FP8Weight) or not alone or max_norm is not None or jit_tracing() or in_forward_mode():
        return NotImplemented
    if input.dtype not in (torch.int64, torch.int32) or input.device != weight.device:
        return NotImplemented
    return _embedding(weight, input)


@implements(OPERATIONS, aten.embedding.default)
def _embedding(weight: Any, indices: Any, *padding: Any) -> Any:
    """Gathers rows and dequantizes only those."""
    taken = isinstance(weight, FP8Weight) and weight._home.precision != "original" and not exporting_to_onnx()
    part = weight.part() if taken else None
    if part is None or part.flipped or not part.all_columns(weight._home.layout) or weight.dim() != 2:
        return NotImplemented
    return _rows_of(weight, part, indices)


@implements(OPERATIONS, aten.index_select.default)
def _index_select(weight: Any, dim: int, indices: Any) -> Any:
    return _index(weight, [indices]) if isinstance(weight, FP8Weight) and dim % weight.dim() == 0 else NotImplemented


@implements(OPERATIONS, aten.index.Tensor)
def _index(weight: Any, indices: Any) -> Any:
    """Experts of a stack, indexed in FP8; rows of a matrix, dequantized."""
    whole = isinstance(weight, FP8Weight) and len(indices) == 1 and indices[0] is not None and not exporting_to_onnx()
    if not whole or weight._home.precision == "original":
        return NotImplemented
    if indices[0].dtype not in (torch.int64, torch.int32) or weight._home.settle() is None:
        return NotImplemented
    ids, part = indices[0], weight.part()
    if part is None:
        return NotImplemented
    if weight.dim() == 2:
        straight = part.all_columns(weight._home.layout) and not part.flipped
        if straight and not ids.is_meta and not torch.compiler.is_compiling():
            ids = torch.where(ids < 0, ids + weight.shape[0], ids)
        return _rows_of(weight, part, ids) if straight else NotImplemented
    if ids.dim() != 1 or not _every_expert(weight, part):
        return NotImplemented
    home = ChosenExperts(weight._home, torch.where(ids < 0, ids + weight.shape[0], ids))
    chosen = FP8Weight(home, weight.dtype)
    return chosen if part.flipped == home.layout.turned else chosen.turned_around()


def _every_expert(weight: FP8Weight, part: Part) -> bool:
    n, k = weight._home.layout.matrix
    return part.rows == (0, n) and part.cols == (0, k) and part.experts == (0, weight._home.layout.shape[0])


def _rows_of(weight: FP8Weight, part: Part, indices: torch.Tensor) -> Any:
    """Rows ``indices`` of a matrix ``[N, K]``, dequantized: ``[..., K]``."""
    home = weight._home
    stored = home.settle()
    taken = None if stored is None else part.take(stored.scaled())
    if taken is None:
        return NotImplemented
    return rows_of(taken, indices, weight.dtype)
