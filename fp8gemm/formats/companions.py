"""Tensors beside an FP8 weight that may change what it means: low-rank parts, rotations, orders, second scales."""

from __future__ import annotations

import re

from .base import Contents, Format, Names

# What published files store beside a weight that changes its values or its input, by the end of the key.
KNOWN = {
    r"\w*svd_?(up|down|u|s|v)?|(lora|proj)_(up|down|a|b)|\w*low_?rank\w*": "a low-rank part added to the weight",
    r"\w*(rotat|hadamard)\w*|had_?[kru]?|su|sv": "a rotation of the input or of the weight",
    r"\w*pre_(quant_)?scale|\w*smooth\w*|(awq|act|channel|col|column)_scales?": "a scale of the input's channels",
    r"\w*(g_idx|perm(utation)?)": "an order of the input's channels",
    r"\w*(zp|zero_points?|zeros|offset|shift|min|bias_correction)": "an offset of the weight",
    r"\w*scale_?[2-9]|\w*(global|double|block|super|second)_scales?|\w*scale_(scale|zero_point)|zero_point_scale": (
        "a scale of the scales"
    ),
    r"\w*(outliers?|salient)\w*|\w*sparse\w*|\w*mask|\w*(codebooks?|lut)": "a part of the weight that is stored apart",
}
_KNOWN = [(re.compile(pattern, re.IGNORECASE), what) for pattern, what in KNOWN.items()]
# Tensors of a linear layer, an attention or a router that leave the weight as it is.
_HARMLESS = re.compile(
    r"bias|_extra_state|(\w+_)?(correction|expert)_bias|tid2eid|weight_shape|(input|activation)_scale_ub|output_scale"
    r"|(weight|input|output)_amax|(q|k|v|kv|qk|attn|prob|softmax|k_cache|v_cache)_(scale|zero_point)"
)


def meaning(key: str) -> str:
    """What a tensor called ``key`` does to the weight beside it; empty if no part of its name is known."""
    return next((what for pattern, what in _KNOWN for part in key.split(".") if pattern.fullmatch(part)), "")


def parts(contents: Contents, names: Names, module: str) -> list[str]:
    """The scales and zero points of a module's weight."""
    suffixes = (*names.scales, *names.input_scales, *names.zero_points)
    return [module + suffix for suffix in suffixes if module + suffix in contents.tensors]


class Neighbors:
    """The keys of a checkpoint by module, to find what stands beside an FP8 weight."""

    def __init__(self, contents: Contents, format: Format) -> None:
        self._contents, self._format = contents, format
        self._below: dict[str, list[str]] = {}
        for key in contents.tensors:
            module = key
            while module:
                module = module.rpartition(".")[0]
                self._below.setdefault(module, []).append(key)

    def reason(self, key: str, names: Names, module: str) -> str:
        """Why the FP8 weight ``key`` is not all there is to its layer; empty if nothing says so."""
        if reason := self._format.unreadable(self._contents, module):
            return reason
        for other in self._beside(key, names, module):
            if what := meaning(other.removeprefix(f"{module}.")):
                return f"{other} beside it is {what}, which is not applied; only FP8 weights with plain scales are read"
        return ""

    def unknown(self, key: str, names: Names, module: str) -> tuple[str, ...]:
        """The keys beside the weight ``key``, or below its module, whose meaning is not known."""
        return tuple(self._beside(key, names, module))

    def _beside(self, key: str, names: Names, module: str) -> list[str]:
        near = self._below.get(module, []) if module else []
        if not names.weight:
            # A stack's scales are parameters of the same module, as are other stacks and what would change this one.
            beside = self._below[key.rpartition(".")[0]]
            near = near + [k for k in beside if k.startswith(f"{key}_") and meaning(k.removeprefix(f"{key}_"))]
        explained = {key, *parts(self._contents, names, module)}
        explained |= {k for k in near if _HARMLESS.fullmatch(k.rpartition(".")[2]) or self._format.is_marker(k)}
        return [k for k in near if k not in explained]
