"""Scales of the attention's operands and of the key-value cache, under the names that engines and exporters use."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .base import TensorInfo

# What is scaled; "prob" and "softmax" are the attention's probabilities.
_OPERANDS = (
    r"(q|k|v|p|kv|qk|qkv|query|key|value|attn|prob|softmax|prob_output|softmax_output|attn_output|kv_c|c_kv|k_pe"
    r"|(past_)?(q|k|v|kv|key|value)_cache|past_(key|value)|kv_(quant_orig|orig_quant))"
)
_WHAT = r"((inv_|dequant_|de|rcp_)?scales?(_inv)?|zero_points?|(rcp_)?scaling_factor|amax)"
_NAMES = re.compile(rf"_?((fp8|calibrated)_)?{_OPERANDS}_{_WHAT}(_float)?")
# Names that say it together with the module before them.
_PAIRS = {
    "output_scale": re.compile(r"(q|k|v|o|kv|qkv|query|key|value|kv_a|kv_b)(_proj)?|softmax|matmul"),
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
