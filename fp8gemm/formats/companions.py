"""Tensors beside an FP8 weight that may change what it means: low-rank parts, rotations, orders, second scales."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What published files store beside a weight that changes its values or its input, by the end of the key.
KNOWN = {
    r"svd_(up|down)|lora_(up|down|a|b)|proj_(up|down)|low_?rank\w*": "a low-rank part that is added to the weight",
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
# Tensors of a linear layer or a router that leave the weight as it is.
_HARMLESS = re.compile(
    r"bias|_extra_state|e_score_correction_bias|tid2eid|weight_shape|(input|activation)_scale_ub|output_scale"
    r"|(weight|input|output)_amax"
)


def meaning(key: str) -> str:
    """What the tensor ``key`` is known to do to the weight beside it; empty if its name is not known."""
    last = key.rpartition(".")[2]
    return next((what for pattern, what in _KNOWN if pattern.fullmatch(last)), "")


def unexplained(beside: Iterable[str]) -> list[str]:
    """Those of the keys directly beside a weight that may change what it means."""
    return [key for key in beside if not _HARMLESS.fullmatch(key.rpartition(".")[2])]
