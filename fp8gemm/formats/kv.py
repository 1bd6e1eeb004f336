"""Scales of the attention's operands and of the key-value cache, under the names that engines and exporters use."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .base import TensorInfo

# What is scaled; "prob" and "softmax" are the attention's probabilities.
_OPERANDS = (
    r"(q|k|v|kv|qk|qkv|query|key|value|attn|prob|softmax|prob_output|attn_output"
    r"|(q|k|v|kv|key|value)_cache|kv_(quant_orig|orig_quant))"
)
_NAMES = re.compile(
    rf"_?{_OPERANDS}_(scale|scale_inv|scales|zero_point|scaling_factor|rcp_scaling_factor|dequant_scale)(_float)?"
)
# Names that say it together with the module before them.
_PAIRS = {
    "output_scale": re.compile(r"(q|k|v|o|kv|qkv)_proj|softmax|matmul"),
    "output_zero_point": re.compile(r"(q|k|v|kv|qkv)_proj"),
    "scale": re.compile(r"q|k|v|(q|k|v|kv)_cache"),
    "_amax": re.compile(r"(q|k|v|softmax|p)_bmm_quantizer|output_quantizer"),
    "_scale": re.compile(r"(q|k|v|softmax|p)_bmm_quantizer|output_quantizer"),
    "qscale_act": re.compile(r"(q|k|v|kv)_fake_quantizer"),
}


def is_kv_scale(key: str, info: TensorInfo, config: Mapping[str, Any] | None) -> bool:
    """Whether a tensor is such a scale: by its name, and by being one number or one for each head of the config."""
    module, _, name = key.rpartition(".")
    pair = _PAIRS.get(name)
    known = _NAMES.fullmatch(name) or (pair is not None and pair.fullmatch(module.rpartition(".")[2]))
    return bool(known) and (info.numel == 1 or (max(info.shape) == info.numel and info.numel in _heads(config or {})))


def _heads(config: Mapping[str, Any]) -> Iterator[int]:
    """The numbers of heads that a config, or the configs in it, describe."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _heads(value)
        elif name in ("num_attention_heads", "num_key_value_heads", "n_head") and isinstance(value, int):
            yield value
