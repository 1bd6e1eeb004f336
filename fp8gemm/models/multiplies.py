"""Which of torch's operations are matrix products, their factors, and the number of their multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# The positions of the arguments that are a product's factors, of any overload: in place, into ``out``, or into another
# dtype. The first factor is contracted over its last dimension, the second over its second to last.
_FACTORS: Mapping[Any, tuple[int, int]] = {
    **dict.fromkeys((aten.mm, aten.bmm, aten.matmul, aten.mv, aten.dot, aten._grouped_mm, aten.linear), (0, 1)),
    **dict.fromkeys((aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_, aten.addmv, aten.addmv_), (1, 2)),
}
CONVOLUTIONS = (aten.convolution.default, aten._convolution.default, aten.mkldnn_convolution.default)
# Operations that run whole layers: each 2-D weight is multiplied once per token of the first operand.
_LAYERS = (
    *(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input, aten.mkldnn_rnn_layer.default),
    *(aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default),
    *(aten._native_multi_head_attention.default, aten._transformer_encoder_layer_fwd.default),
)


def places_of(func: Any) -> tuple[int, int] | None:
    """The positions of a matrix product's factors among its arguments; None for other operations."""
    return _FACTORS.get(packet_of(func))


def packet_of(func: Any) -> Any:
    """All overloads of an operation: ``aten.mm`` for ``aten.mm.out``; None for what has none."""
    return getattr(func, "overloadpacket", None)


def factors_of(func: Any, args: tuple[Any, ...]) -> list[Any]:
    """The operands of an operation that are multiplied as matrices; empty if it is not a product."""
    if (places := places_of(func)) is not None:
        return [args[place] for place in places if place < len(args)]
    if func in CONVOLUTIONS:
        return [args[1]]
    if func is aten._trilinear.default:
        return [args[1]]
    if func in _LAYERS:
        return [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.dim() == 2]
    return []


def multiply_adds(func: Any, args: tuple[Any, ...], y: Any) -> int:
    """The number of multiply-adds of an operation, if it is a matrix product or a convolution; else 0."""
    if (places := places_of(func)) is not None:
        a = args[places[0]]
        return int(y.numel() * a.shape[-1]) if isinstance(y, torch.Tensor) else 0
    if func in CONVOLUTIONS:
        x, weight = args[0], args[1]
        turned = func is not aten.mkldnn_convolution.default and len(args) > 6 and bool(args[6])
        return int((x if turned else y).numel() * math.prod(weight.shape[1:]))
    if func is aten._trilinear.default:
        return tokens(args[0]) * int(args[1].numel())
    return 0


def is_layer(func: Any) -> bool:
    """Whether an operation multiplies each of its factors once per token of its first argument."""
    return func in _LAYERS


def tokens(x: torch.Tensor) -> int:
    return int(x.numel() // max(x.shape[-1], 1))


def is_view(func: Any) -> bool:
    """Whether an operation only returns a view of the same memory."""
    arguments = func._schema.arguments
    alias = arguments[0].alias_info if arguments else None
    return alias is not None and not alias.is_write
