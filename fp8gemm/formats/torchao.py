"""torchao's Float8Tensor in safetensors: the inner tensors of a subclass, described in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError
from ..scaled import ROW, TENSOR, Granularity
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

    def granularities(self, contents: Contents, module: str) -> Sequence[Granularity]:
        block = _described(contents, module).get("block_size")
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
        kind = (asked.get("_data") or {}).get("granularity") or {}
        if kind.get("_type") == "PerTensor":
            return Activation(granularity=TENSOR, static=False)
        if kind.get("_type") == "PerBlock":
            size = (kind.get("_data") or {}).get("block_size") or [1, 128]
            return Activation(granularity=Granularity(1, size[-1]), static=False)
        return Activation(granularity=ROW, static=False)


def _natural(weight: Granularity) -> Granularity:
    return TENSOR if weight == TENSOR else ROW


def _described(contents: Contents, module: str) -> Mapping[str, Any]:
    """What the metadata says about a module's weight.

    Raises:
        CheckpointError: the description is not JSON, or the tensor is not FP8.
    """
    text = contents.metadata.get(f"{module}.weight")
    if text is None:
        return {}
    try:
        described = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"the metadata of {module}.weight is not JSON: {error}") from error
    if described.get("_type") not in ("Float8Tensor", "Tensor"):
        raise CheckpointError(f"{module}.weight is a torchao {described.get('_type')}; only Float8Tensor can be read")
    data = described.get("_data")
    return data if isinstance(data, Mapping) else {}
