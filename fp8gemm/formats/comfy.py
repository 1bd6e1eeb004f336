"""ComfyUI's single-file checkpoints: legacy ``scaled_fp8``, ``_quantization_metadata``, ``comfy_quant``, raw casts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from ..errors import CheckpointError
from ..scaled import BLOCK_128, FP8_DTYPES, ROW, TENSOR, Granularity
from .base import Activation, Contents, Format, Layout, TensorInfo

_PREFIX = "model.diffusion_model."
_METADATA = "_quantization_metadata"
_DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_SCALES = ("weight_scale", "scale_weight", "weight_scale_inv", "_scale")


class Comfy(Format):
    name = "comfy"
    strips = True

    def recognises(self, contents: Contents) -> str:
        if contents.config:
            return ""
        if _METADATA in contents.metadata:
            return f"metadata {_METADATA}"
        for key in contents.tensors:
            if self.is_marker(key) or key.endswith(".scale_weight"):
                return f"a tensor named {key.rpartition('.')[2]}"
        if self.allows_raw(contents):
            return "FP8 tensors without a config or any scale: a raw cast"
        return ""

    def canonical(self, key: str) -> str:
        return key.removeprefix(_PREFIX)

    def is_marker(self, key: str) -> bool:
        return key.rpartition(".")[2] in ("scaled_fp8", "comfy_quant")

    def fp8_dtype(self, key: str, info: TensorInfo, contents: Contents) -> torch.dtype | None:
        if info.dtype in FP8_DTYPES:
            return info.dtype
        if info.dtype != torch.uint8 or not key.endswith(".weight"):
            return None
        module = key.removesuffix(".weight")
        return _DTYPES.get(_kind(_described(contents, module), module)) if _described(contents, module) else None

    def allows_raw(self, contents: Contents) -> bool:
        if contents.model_config is not None or not contents.holds_fp8 or _METADATA in contents.metadata:
            return False
        return not any(self.is_marker(key) or key.endswith(_SCALES) for key in contents.tensors)

    def granularities(self, contents: Contents, module: str) -> Sequence[Granularity]:
        described = _described(contents, module)
        size = described.get("group_size") or described.get("block_size")
        if isinstance(size, int):
            return (Granularity(size, size),)
        if isinstance(size, Sequence) and len(size) == 2:
            return (Granularity(int(size[0]), int(size[1])),)
        kind = str(described.get("format", ""))
        return (BLOCK_128,) if kind.endswith("_blockwise") else (ROW,) if kind.endswith("_rowwise") else ()

    def activation(self, contents: Contents, module: str, weight: Granularity) -> Activation:
        if _full_precision(contents, module):
            return Activation(granularity=None)
        if weight.cols is not None:
            return Activation(granularity=Granularity(1, weight.cols), static=False)
        return Activation(granularity=TENSOR if weight == TENSOR else ROW)

    def check(self, contents: Contents, layout: Layout) -> None:
        if layout.layers and self.allows_raw(contents):
            layout.suspicious.append("no scales: read as a raw cast, with every scale 1")
        for module in _header(contents.metadata.get(_METADATA, "")):
            name = self.canonical(f"{module}.weight")
            if name not in layout.layers and f"{_PREFIX}{module}.weight" not in contents.tensors:
                layout.suspicious.append(f"the metadata describes {module}, which is not FP8")


def _described(contents: Contents, module: str) -> Mapping[str, Any]:
    """What the file says about a module: in its header, or in a small JSON tensor next to the weight."""
    header = _header(contents.metadata.get(_METADATA, ""))
    for name in (module, module.removeprefix(_PREFIX)):
        if isinstance(described := header.get(name), Mapping):
            return described
    key = f"{module}.comfy_quant"
    if key in contents.tensors and contents.read is not None:
        return _parsed(bytes(contents.read(key).to(torch.uint8).tolist()), key)
    return {}


@lru_cache(maxsize=8)
def _header(text: str) -> Mapping[str, Any]:
    if not text:
        return {}
    layers = _parsed(text.encode(), _METADATA).get("layers")
    return layers if isinstance(layers, Mapping) else {}


def _parsed(text: bytes, where: str) -> Mapping[str, Any]:
    try:
        described = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(described, Mapping):
        raise CheckpointError(f"{where} must be a JSON object, found {type(described).__name__}")
    return described


def _kind(described: Mapping[str, Any], module: str) -> str:
    """The dtype that a description names, without a suffix such as ``_rowwise`` or ``_blockwise``.

    Raises:
        CheckpointError: the format is not FP8.
    """
    named = str(described.get("format", ""))
    kind = next((dtype for dtype in _DTYPES if named.startswith(dtype)), None)
    if kind is None:
        raise CheckpointError(f"{module} is stored as {named!r}; ComfyUI's FP8 formats are {' and '.join(_DTYPES)}")
    return kind


def _full_precision(contents: Contents, module: str) -> bool:
    """Whether the file asks for weights to be dequantized before the product."""
    if _described(contents, module).get("full_precision_matrix_mult"):
        return True
    # The legacy marker at the root of the model encodes it in its size: 0 elements allow FP8 products, 2 do not.
    while module:
        module = module.rpartition(".")[0]
        marker = contents.tensors.get(f"{module}.scaled_fp8" if module else "scaled_fp8")
        if marker is not None:
            return marker.numel == 2
    return False
