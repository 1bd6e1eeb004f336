"""ComfyUI's single-file checkpoints: ``comfy_quant``, ``_quantization_metadata``, legacy ``scaled_fp8``, raw casts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..errors import CheckpointError
from ..numerics import encode_ue8m0
from ..scaled import FP8_DTYPES, MX, ROW, TENSOR, Granularity, ScaledTensor, Scheme
from .arrangements import Arrangement, scaled_in_tiles
from .base import LINEAR, Activation, Contents, Format, Layout, TensorInfo, Written
from .tiles import tiled, tiled_shape

_PREFIX = "model.diffusion_model."
_METADATA = "_quantization_metadata"
_SCALAR = ".weight_scalar"
# What a description of a layer may say. Anything else could change what the weight means (convrot, a rotation).
_KNOWN = ("format", "full_precision_matrix_mult", "group_size", "block_size", "orig_dtype", "orig_shape", "params")
_LONGEST = 1 << 16  # elements of a description


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of the formats that descriptions name; ``granularity`` is None where it depends on the group size."""

    dtype: torch.dtype = torch.float8_e4m3fn
    granularity: Granularity | None = None
    by_rows: bool = False  # groups within a row, not square blocks
    tiled: bool = False


# ComfyUI's own formats and those of ComfyUI-QuantOps (the ones with a suffix, and hybrid_mxfp8, which is mxfp8 with one
# more scale, weight_scalar, that replaces the others on cards without MXFP8).
KINDS = {
    "float8_e4m3fn": Kind(granularity=TENSOR),
    "float8_e5m2": Kind(dtype=torch.float8_e5m2, granularity=TENSOR),
    "float8_e4m3fn_rowwise": Kind(granularity=ROW),
    "float8_e4m3fn_blockwise": Kind(),
    "float8_e4m3fn_block3d": Kind(by_rows=True),
    "mxfp8": Kind(granularity=MX, tiled=True),
    "hybrid_mxfp8": Kind(granularity=MX, tiled=True),
}


class Comfy(Format):
    name = "comfy"
    strips = True
    writable = True
    single_file = True

    def recognises(self, contents: Contents) -> str:
        if contents.config:
            return ""
        if _METADATA in contents.metadata:
            return f"metadata {_METADATA}"
        for key in contents.tensors:
            if key.rpartition(".")[2] in ("scaled_fp8", "comfy_quant", "scale_weight"):
                return f"a tensor named {key.rpartition('.')[2]}"
        if contents.holds_fp8 and self.allows_raw(contents) and not self._has_scales(contents):
            return "FP8 tensors without a config or any scale: a raw cast"
        return ""

    def canonical(self, key: str) -> str:
        return key.removeprefix(_PREFIX)

    def is_marker(self, key: str) -> bool:
        return key.rpartition(".")[2] in ("scaled_fp8", "comfy_quant", "weight_scalar")

    def fp8_dtype(self, key: str, info: TensorInfo, contents: Contents) -> torch.dtype | None:
        if info.dtype in FP8_DTYPES:
            return info.dtype
        if info.dtype != torch.uint8 or not key.endswith(".weight"):
            return None
        kind = _kind(contents, key.removesuffix(".weight"))
        return None if kind is None else kind.dtype

    def allows_raw(self, contents: Contents) -> bool:
        return contents.raw or contents.model_config is None or _is_cast_as_a_whole(contents)

    def unreadable(self, contents: Contents, module: str) -> str:
        described = _described(contents, module)
        named = described.get("format")
        if named is not None and _kind(contents, module) is None:
            return f"{_told(contents, module)} is stored as {named!r}; ComfyUI's FP8 formats are {', '.join(KINDS)}"
        if named is not None and not any(module + suffix in contents.tensors for suffix in LINEAR.scales):
            return f"{_told(contents, module)} is stored as {named!r}, but has no scale"
        if unknown := [name for name, value in described.items() if value and name not in _KNOWN]:
            what = ", ".join(unknown)
            return f"{_told(contents, module)} is described with {what}, which may change its values and is not known"
        return ""

    def granularities(self, contents: Contents, module: str) -> Sequence[Granularity]:
        kind = _kind(contents, module)
        size = _group_size(contents, module)
        if isinstance(size, int) and size > 0:
            return (Granularity(1 if kind is not None and kind.by_rows else size, size),)
        if isinstance(size, Sequence) and len(size) == 2 and all(isinstance(one, int) and one > 0 for one in size):
            return (Granularity(size[0], size[1]),)
        return () if kind is None or kind.granularity is None else (kind.granularity,)

    def arrangement(self, contents: Contents, key: str, scale: str) -> Arrangement | None:
        kind, shape = _kind(contents, key.removesuffix(".weight")), contents.tensors[key].shape
        if kind is None or not kind.tiled or len(shape) != 2:
            return None
        return scaled_in_tiles(shape, MX, scale, contents.tensors[scale].shape)

    def infers_blocks(self, contents: Contents, module: str) -> bool:
        return _group_size(contents, module) is None

    def activation(self, contents: Contents, module: str, weight: Granularity) -> Activation:
        if _full_precision(contents, module):
            return Activation(granularity=None)
        if weight.cols is not None:
            return Activation(granularity=Granularity(1, weight.cols), static=False)
        return Activation(granularity=TENSOR if weight == TENSOR else ROW)

    def check(self, contents: Contents, layout: Layout) -> None:
        raw = [name for name, layer in layout.layers.items() if layer.scale is None]
        if raw and len(raw) == len(layout.layers):
            layout.suspicious.append("no scales: read as a raw cast, with every scale 1")
        elif raw:
            layout.suspicious.append(f"{len(raw)} FP8 weights have no scale and were read with a scale of 1: {raw[0]}")
        for module in _header(contents.metadata.get(_METADATA, "")):
            name = self.canonical(f"{module}.weight")
            if name not in layout.layers and name not in layout.unsupported:
                layout.suspicious.append(f"the metadata describes {module}, which is not FP8")
        for key in contents.tensors:
            if key.endswith(_SCALAR):
                layout.unused[key] = "replaces the scales per group on cards without MXFP8"

    def _has_scales(self, contents: Contents) -> bool:
        """Whether any FP8 matrix has a scale of a known name."""
        for key, info in contents.tensors.items():
            if info.dtype in FP8_DTYPES and len(info.shape) >= 2:
                names, module = self.names_of(key)
                if any(module + suffix in contents.tensors for suffix in names.scales):
                    return True
        return False

    def refuses(self, layers: Mapping[str, Written]) -> list[str]:
        reasons = []
        for name, layer in layers.items():
            if len(layer.shape) != 2:
                reasons.append(f"{name}: comfy stores matrices [N, K], found shape {list(layer.shape)}")
            elif _named(layer) is None:
                reasons.append(
                    f"{name}: comfy stores one scale per tensor, and for float8_e4m3fn also scales per row, square "
                    f"blocks that divide the matrix and MXFP8; found {layer.dtype} {list(layer.shape)}, {layer.scheme}"
                )
        return reasons

    def stored(self, name: str, layer: Written) -> dict[str, TensorInfo]:
        described = _description(layer)
        tensors = {
            f"{name}.weight": TensorInfo(dtype=layer.dtype, shape=layer.shape),
            f"{name}.weight_scale": TensorInfo(dtype=_scale_dtype(layer.scheme), shape=_scale_shape(layer)),
            f"{name}.comfy_quant": TensorInfo(dtype=torch.uint8, shape=(len(described),)),
        }
        if layer.scheme.static:
            tensors[f"{name}.input_scale"] = TensorInfo(dtype=torch.float32, shape=())
        return tensors

    def write(
        self, name: str, layer: Written, weight: ScaledTensor, input_scale: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        mx = weight.granularity == MX
        scale = tiled(encode_ue8m0(weight.scale).cpu()) if mx else weight.scale.to(torch.float32)
        tensors = {
            f"{name}.weight": weight.data,
            f"{name}.weight_scale": scale.reshape(_scale_shape(layer)).view(_scale_dtype(layer.scheme)),
            f"{name}.comfy_quant": torch.frombuffer(bytearray(_description(layer)), dtype=torch.uint8),
        }
        if layer.scheme.static and input_scale is not None:
            tensors[f"{name}.input_scale"] = input_scale.to(torch.float32).reshape(())
        return tensors

    def write_config(self, layers: Mapping[str, Written], unquantized: Sequence[str]) -> dict[str, Any]:
        return {}


def _named(layer: Written) -> str | None:
    """The name of the format that holds a layer."""
    weight, ue8m0 = layer.scheme.weight, layer.scheme.scale_format == "ue8m0"
    e4m3 = layer.dtype == torch.float8_e4m3fn
    if weight == TENSOR:
        return "float8_e4m3fn" if e4m3 else "float8_e5m2"
    if not e4m3:
        return None
    if weight == ROW:
        return "float8_e4m3fn_rowwise"
    n, k = layer.shape
    if weight == MX:
        return "mxfp8" if ue8m0 and n % 32 == k % 32 == 0 else None
    even = weight.rows is not None and weight.rows == weight.cols and n % weight.rows == k % weight.rows == 0
    return "float8_e4m3fn_blockwise" if even else None


def _description(layer: Written) -> bytes:
    """The JSON in a ``comfy_quant`` tensor."""
    described: dict[str, Any] = {"format": _named(layer)}
    if described["format"] == "float8_e4m3fn_blockwise":
        described["group_size"] = layer.scheme.weight.rows
    if layer.scheme.activation is None:
        described["full_precision_matrix_mult"] = True
    return json.dumps(described).encode()


def _scale_dtype(scheme: Scheme) -> torch.dtype:
    return torch.float8_e8m0fnu if scheme.weight == MX else torch.float32


def _scale_shape(layer: Written) -> tuple[int, ...]:
    weight, grid = layer.scheme.weight, layer.scheme.weight.scale_shape(layer.shape)
    if weight == MX:
        return tiled_shape(grid[0], grid[1])
    return () if weight == TENSOR else grid[:1] if weight == ROW else grid


def _is_cast_as_a_whole(contents: Contents) -> bool:
    """Whether a folder's config and tensors leave only a model that was cast to FP8, with no room for a scale.

    Either the config says that the model's dtype is FP8, or a model of diffusers has no other floating-point tensor.
    """
    config = contents.model_config or {}
    said = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    if said in ("float8_e4m3fn", "float8_e5m2"):
        return True
    floating = {info.dtype for info in contents.tensors.values() if info.dtype.is_floating_point}
    return "_class_name" in config and len(floating) == 1 and floating <= set(FP8_DTYPES)


def _told(contents: Contents, module: str) -> str:
    info = contents.tensors[f"{module}.weight"]
    return f"{module}.weight {list(info.shape)} ({str(info.dtype).removeprefix('torch.')})"


def _kind(contents: Contents, module: str) -> Kind | None:
    """The format that a module's description names; None if it has none, or one that is not FP8."""
    named = _described(contents, module).get("format")
    return KINDS.get(named) if isinstance(named, str) else None


def _group_size(contents: Contents, module: str) -> object:
    described = _described(contents, module)
    return described.get("group_size") or described.get("block_size")


def _described(contents: Contents, module: str) -> Mapping[str, Any]:
    """What the file says about a module: in its header, or in a small JSON tensor next to the weight."""
    header = _header(contents.metadata.get(_METADATA, ""))
    for name in (module, module.removeprefix(_PREFIX)):
        described = header.get(name)
        if isinstance(described, str):
            return {"format": described}
        if isinstance(described, Mapping):
            return _flat(described)
        key = f"{name}.comfy_quant"
        if key in contents.tensors and contents.read is not None:
            if contents.tensors[key].numel > _LONGEST:
                raise CheckpointError(f"{key} has {contents.tensors[key].numel} elements, too many to describe a layer")
            return _flat(_parsed(bytes(contents.read(key).to(torch.uint8).tolist()), key))
    return {}


def _flat(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """A description without the level that some writers put its parameters in."""
    inner = described.get("params")
    return {**described, **inner} if isinstance(inner, Mapping) else described


@lru_cache(maxsize=8)
def _header(text: str) -> Mapping[str, Any]:
    if not text:
        return {}
    layers = _parsed(text.encode(), _METADATA).get("layers")
    return layers if isinstance(layers, Mapping) else {}


@lru_cache(maxsize=256)
def _parsed(text: bytes, where: str) -> Mapping[str, Any]:
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(described, Mapping):
        raise CheckpointError(f"{where} must be a JSON object, found {type(described).__name__}")
    return described


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
