"""Optimum-quanto's qfloat8 weights: ``weight._data`` and ``weight._scale``."""

from __future__ import annotations

from ..scaled import Granularity
from .base import Activation, Contents, Format, Names

_DATA = ".weight._data"


class Quanto(Format):
    name = "quanto"
    names = (Names(weight=_DATA, scales=(".weight._scale",)),)

    def recognises(self, contents: Contents) -> str:
        if contents.method == "quanto":
            return "quant_method quanto"
        if any(key.endswith(_DATA) for key in contents.tensors):
            return "tensors named weight._data"
        return ""

    def canonical(self, key: str) -> str:
        return key.removesuffix("._data") if key.endswith(_DATA) else key

    def is_marker(self, key: str) -> bool:
        # Every module of quanto has both; they count only where activations are quantized, which is not done here.
        return key.endswith((".input_scale", ".output_scale"))

    def activation(self, contents: Contents, module: str, weight: Granularity) -> Activation:
        return Activation(granularity=None)
