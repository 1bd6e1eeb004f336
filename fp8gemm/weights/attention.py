"""torch's fused attention layers, taken apart into their products: compiled graphs call them with FP8 weights.

In eager mode nn.MultiheadAttention and nn.TransformerEncoderLayer ask whether a weight overrides torch's functions, and
run step by step; Dynamo answers no for them. The steps are those of ``transformer_encoder_layer_forward`` and
``native_multi_head_attention`` in ATen/native/transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .dispatch import OPERATIONS, implements

aten = torch.ops.aten


@implements(OPERATIONS, aten._transformer_encoder_layer_fwd.default)
def _encoder_layer(
    src: Any,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Any,
    qkv_bias: Any,
    proj_weight: Any,
    proj_bias: Any,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Any,
    norm_bias_1: Any,
    norm_weight_2: Any,
    norm_bias_2: Any,
    ffn_weight_1: Any,
    ffn_bias_1: Any,
    ffn_weight_2: Any,
    ffn_bias_2: Any,
    mask: Any = None,
    mask_type: int | None = None,
) -> Any:
    """``src [B, L, E]`` to the same shape."""
    if src.is_nested:
        return NotImplemented

    def attend(x: torch.Tensor) -> torch.Tensor:
        q, k, v = _heads(F.linear(x, qkv_weight, qkv_bias), 3 * num_heads).chunk(3, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, _added(mask, mask_type, x.dtype))
        return F.linear(y.transpose(1, 2).flatten(-2), proj_weight, proj_bias)

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(y) if use_gelu else F.relu(y), ffn_weight_2, ffn_bias_2)

    def first(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(first(src))
        return x + feed_forward(second(x))
    x = first(src + attend(src))
    return second(x + feed_forward(x))


@implements(OPERATIONS, aten._native_multi_head_attention.default)
def _attention(
    query: Any,
    key: Any,
    value: Any,
    embed_dim: int,
    num_head: int,
    qkv_weight: Any,
    qkv_bias: Any,
    proj_weight: Any,
    proj_bias: Any,
    mask: Any = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Any:
    """``query [B, L, E]``, ``key`` and ``value [B, S, E]`` to ``[B, L, E]`` and the attention weights, if needed."""
    if query.is_nested or key.is_nested or value.is_nested:
        return NotImplemented
    weights = qkv_weight.chunk(3)
    biases = (None, None, None) if qkv_bias is None else qkv_bias.chunk(3)
    q, k, v = (
        _heads(F.linear(x, weight, bias), num_head)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    added = _added(mask, mask_type, query.dtype)
    shares = None
    if need_weights:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        shares = torch.softmax(scores if added is None else scores + added, dim=-1)
        y = shares @ v
        shares = shares.mean(dim=1) if average_attn_weights else shares
    else:
        y = F.scaled_dot_product_attention(q, k, v, added)
    return F.linear(y.transpose(1, 2).flatten(-2), proj_weight, proj_bias), shares


def _heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """``[B, L, count * D]`` as ``[B, count, L, D]``."""
    return x.view(*x.shape[:-1], count, x.shape[-1] // count).transpose(1, 2)


def _added(mask: Any, mask_type: int | None, dtype: torch.dtype) -> Any:
    """What is added to the scores ``[B, H, L, S]``; True in a mask means that a position is left out.

    ``mask_type`` is 0 for a mask ``[L, S]``, 1 for one of padding ``[B, S]``, and 2 for one of all four dimensions.
    """
    if mask is None:
        return None
    if mask_type == 1:
        mask = mask[:, None, None, :]
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
