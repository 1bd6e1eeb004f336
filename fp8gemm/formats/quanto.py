"""Optimum-quanto's qfloat8 weights: ``weight._data`` and ``weight._scale``."""

from __future__ import annotations

from ..scaled import FP8_DTYPES, Granularity
from .base import Activation, Contents, Format, Names

_DATA = ".weight._data"


class Quanto(Format):
    name = "quanto"
    names = (Names(weight=_DATA, scales=(".weight._scale",)),)

    def recognises(self, contents: Contents) -> str:
        if contents.method == "quanto":
            return "quant_method quanto"
        if any(key.endswith(_DATA) and info.dtype in FP8_DTYPES for key, info in contents.tensors.items()):
            return "tensors named weight._data"
        return ""

    def canonical(self, key: str) -> str:
        return key.removesuffix("._data") if key.endswith(_DATA) else key

    def is_marker(self, key: str) -> bool:
        # Every module of quanto has both; they count only where activations are quantized, which is not done here.
        return key.endswith((".input_scale", ".output_scale"))

    def activation(self, contents: Contents, module: str, weight: Granularity) -> Activation:
        return Activation(granularity=None)
