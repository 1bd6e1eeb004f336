"""torchao's Float8Tensor and MXTensor in safetensors: the inner tensors of a subclass, described in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError
from ..scaled import ROW, TENSOR, Granularity
from .arrangements import Arrangement, scaled_in_tiles
from .base import LINEAR, Activation, Contents, Format, Names

_PARTS = Names(weight="._weight_qdata", scales=("._weight_scale",))


class TorchAO(Format):
    name = "torchao"
    names = (_PARTS, Names(weight="_qdata", scales=("_scale",)), LINEAR)

    def recognises(self, contents: Contents) -> str:
        if contents.method == "torchao":
            return "quant_method torchao"
        if any(key.endswith("._weight_qdata") for key in contents.tensors):
            return "tensors named _weight_qdata"
        return ""

    def canonical(self, key: str) -> str:
        module, _, last = key.rpartition(".")
        if last.startswith("_") and last.endswith("_qdata"):
            last = last[1 : -len("_qdata")]
        return f"{module}.{last}" if module else last

    def unreadable(self, contents: Contents, module: str) -> str:
        kind, described = _kind(contents, module), _described(contents, module)
        element = described.get("elem_dtype")
        named = element.get("_data") if isinstance(element, Mapping) else element
        if kind not in _READ or (kind == "MXTensor" and "float8" not in str(named)):
            of = f" of {named}" if named else ""
            return f"{module}.weight is a torchao {kind}{of}; only Float8Tensor and MXTensor of FP8 can be read"
        return super().unreadable(contents, module)

    def arrangement(self, contents: Contents, key: str, scale: str) -> Arrangement | None:
        described, shape = _described(contents, _module_of(key)), contents.tensors[key].shape
        if not described.get("is_swizzled_scales") or len(shape) != 2:
            return None
        granularity = Granularity(1, int(described.get("block_size") or 32))
        return scaled_in_tiles(shape, granularity, scale, contents.tensors[scale].shape)

    def granularities(self, contents: Contents, module: str) -> Sequence[Granularity]:
        block = _described(contents, module).get("block_size")
        if isinstance(block, int):
            return (Granularity(1, block),)
        if not block:
            return ()
        shape = contents.tensors[f"{module}._weight_qdata"].shape
        # block_size is in elements; an undivided dimension has its full size.
        rows, cols = (None if size >= full > 1 else size for size, full in zip(block[-2:], shape[-2:], strict=True))
        return (Granularity(rows, cols),)

    def activation(self, contents: Contents, module: str, weight: Granularity) -> Activation:
        asked = _described(contents, module).get("act_quant_kwargs")
        if not isinstance(asked, Mapping):
            return Activation(granularity=None if _described(contents, module) else _natural(weight))
        settings = asked.get("_data") or {}
        if isinstance(settings.get("block_size"), int):
            return Activation(granularity=Granularity(1, settings["block_size"]), static=False)
        kind = settings.get("granularity") or {}
        if kind.get("_type") == "PerTensor":
            return Activation(granularity=TENSOR, static=False)
        if kind.get("_type") == "PerBlock":
            size = (kind.get("_data") or {}).get("block_size") or [1, 128]
            return Activation(granularity=Granularity(1, size[-1]), static=False)
        return Activation(granularity=ROW, static=False)


def _natural(weight: Granularity) -> Granularity:
    return TENSOR if weight == TENSOR else ROW


_READ = ("", "Float8Tensor", "Tensor", "MXTensor")


def _module_of(key: str) -> str:
    return key.removesuffix(_PARTS.weight)


def _kind(contents: Contents, module: str) -> str:
    """The class of a module's weight; empty if the metadata does not tell."""
    return str(_whole(contents, module).get("_type") or "")


def _described(contents: Contents, module: str) -> Mapping[str, Any]:
    """What the metadata says about a module's weight."""
    data = _whole(contents, module).get("_data")
    return data if isinstance(data, Mapping) else {}


def _whole(contents: Contents, module: str) -> Mapping[str, Any]:
    """The metadata of a module's weight.

    Raises:
        CheckpointError: it is not JSON.
    """
    text = contents.metadata.get(f"{module}.weight")
    if text is None:
        return {}
    try:
        described = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"the metadata of {module}.weight is not JSON: {error}") from error
    return described if isinstance(described, Mapping) else {}
