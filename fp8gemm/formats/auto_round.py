"""Intel AutoRound's FP8 exports: ``weight_scale`` per tensor, row or group, ``weight_scale_inv`` per block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from ..scaled import Granularity
from .arrangements import Arrangement, flattened
from .base import Activation, Contents
from .fine_grained import Plain
from .shapes import block_granularity


class AutoRound(Plain):
    name = "auto-round"
    methods: ClassVar[tuple[str, ...]] = ("auto-round", "auto_round", "intel/auto-round")

    def recognises(self, contents: Contents) -> str:
        return f"quant_method {contents.method}" if contents.method in self.methods and contents.holds_fp8 else ""

    def granularities(self, contents: Contents, module: str) -> Sequence[Granularity]:
        size = _group_size(contents, module)
        own = [block_granularity(size)] if isinstance(size, list) else []
        return [*own, *super().granularities(contents, module)]

    def arrangement(self, contents: Contents, key: str, scale: str) -> Arrangement | None:
        size = _group_size(contents, key.removesuffix(".weight"))
        shape = contents.tensors[key].shape
        if not isinstance(size, int) or size < 1 or len(shape) != 2 or size > shape[1]:
            return None
        return flattened(shape, contents.tensors[scale].shape, size)

    def activation(self, contents: Contents, module: str, weight: Granularity) -> Activation:
        bits, size = contents.config.get("act_bits"), contents.config.get("act_group_size")
        if isinstance(bits, int) and bits >= 16:
            return Activation(granularity=None)
        if isinstance(size, int) and (size > 0 or size == -1):
            return Activation(granularity=Granularity(1, size if size > 0 else None), static=False)
        if weight.cols is not None:
            return Activation(granularity=Granularity(1, weight.cols), static=False)
        return super().activation(contents, module, weight)


def _group_size(contents: Contents, module: str) -> object:
    """The group size of a module: its own, or the model's."""
    extra = contents.config.get("extra_config")
    own = extra.get(module) if isinstance(extra, Mapping) else None
    found = own.get("group_size") if isinstance(own, Mapping) else None
    return contents.config.get("group_size") if found is None else found
