"""compressed-tensors, as llm-compressor writes it and vLLM reads it: ``weight`` and ``weight_scale``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..numerics import encode_ue8m0
from ..scaled import MX, ROW, TENSOR, Granularity, ScaledTensor, Scheme
from .base import Activation, Contents, Format, Layout, TensorInfo, Written
from .patterns import matching
from .shapes import block_granularity

_NOTHING: Mapping[str, Any] = {}


class CompressedTensors(Format):
    name = "compressed-tensors"
    writable = True

    def recognises(self, contents: Contents) -> str:
        if contents.method in ("compressed-tensors", "compressed_tensors"):
            return f"quant_method {contents.method}"
        # The oldest configs have no quant_method, only the library's own fields.
        if not contents.method and "config_groups" in contents.config:
            return "config_groups"
        return ""

    def granularities(self, contents: Contents, module: str) -> Sequence[Granularity]:
        found = [_granularity(group.get("weights") or _NOTHING) for group in _groups(contents, module)]
        return [granularity for granularity in found if granularity is not None]

    def activation(self, contents: Contents, module: str, weight: Granularity) -> Activation:
        for group in _groups(contents, module):
            if _granularity(group.get("weights") or _NOTHING) in (weight, None):
                return _activation(group.get("input_activations"))
        return super().activation(contents, module, weight)

    def check(self, contents: Contents, layout: Layout) -> None:
        kinds = {
            (weights.get("type"), weights.get("num_bits"))
            for group in _all_groups(contents)
            if (weights := group.get("weights") or _NOTHING)
        }
        for kind, bits in sorted(kinds - {("float", 8)}, key=str):
            layout.suspicious.append(f"the config has a group of {bits}-bit {kind} weights, which are not FP8")
        ignored = contents.config.get("ignore") or ()
        for module in matching((name.removesuffix(".weight") for name in layout.layers), ignored):
            layout.suspicious.append(f"{module} is FP8 although the config ignores it")

    def unreadable(self, contents: Contents, module: str) -> str:
        """An online transform of this module: its weight is stored rotated, and its input or output must be, too.

        Transforms of weights alone (``weight_input``, ``weight_output``) are in the stored values. Queries and keys
        that are rotated by the same matrix have the same products as without it.
        """
        for name, transform in _transforms(contents):
            applied = [part for part in transform.get("apply") or () if isinstance(part, Mapping)]
            places = {str(part.get("location")) for part in applied}
            online = places - _FUSED - (_ATTENTION if places >= _ATTENTION else set())
            for part in applied:
                location = str(part.get("location"))
                if location in online and (location in _ATTENTION or _is_target(module, part)):
                    return (
                        f"transform_config {name} rotates its {location} online ({transform.get('type')}), which is "
                        "not applied; vLLM runs such checkpoints, and one that is made without transforms can be read"
                    )
        return super().unreadable(contents, module)

    def refuses(self, layers: Mapping[str, Written]) -> list[str]:
        reasons = []
        for name, layer in layers.items():
            if layer.dtype != torch.float8_e4m3fn:
                reasons.append(f"{name}: compressed-tensors stores float8_e4m3fn, found {layer.dtype}")
            if len(layer.shape) != 2:
                reasons.append(f"{name}: compressed-tensors stores matrices [N, K], found shape {list(layer.shape)}")
            elif _strategy(layer.scheme) is None:
                reasons.append(f"{name}: compressed-tensors has no weight scales of granularity {layer.scheme.weight}")
            elif (
                layer.scheme.weight.rows == 1 and layer.scheme.weight.cols and layer.shape[1] % layer.scheme.weight.cols
            ):
                reasons.append(f"{name}: groups of {layer.scheme.weight.cols} do not divide K = {layer.shape[1]}")
            if layer.scheme.static and layer.scheme.activation != TENSOR:
                reasons.append(f"{name}: static activation scales must be per tensor, found {layer.scheme.activation}")
        return reasons

    def stored(self, name: str, layer: Written) -> dict[str, TensorInfo]:
        grid = layer.scheme.weight.scale_shape(layer.shape)
        shape = (1,) if layer.scheme.weight == TENSOR else grid
        tensors = {
            f"{name}.weight": TensorInfo(dtype=layer.dtype, shape=layer.shape),
            f"{name}.weight_scale": TensorInfo(dtype=_scale_dtype(layer), shape=shape),
        }
        if layer.scheme.static:
            tensors[f"{name}.input_scale"] = TensorInfo(dtype=_scale_dtype(layer), shape=(1,))
        return tensors

    def write(
        self, name: str, layer: Written, weight: ScaledTensor, input_scale: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        scale = weight.scale.reshape(1) if layer.scheme.weight == TENSOR else weight.scale
        mx = _scale_dtype(layer) == torch.uint8
        tensors = {
            f"{name}.weight": weight.data,
            f"{name}.weight_scale": encode_ue8m0(scale) if mx else scale.to(_scale_dtype(layer)),
        }
        if layer.scheme.static and input_scale is not None:
            tensors[f"{name}.input_scale"] = input_scale.to(_scale_dtype(layer)).reshape(1)
        return tensors

    def write_config(self, layers: Mapping[str, Written], unquantized: Sequence[str]) -> dict[str, Any]:
        by_scheme: dict[str, list[str]] = {}
        for name, layer in layers.items():
            by_scheme.setdefault(json.dumps(_group(layer.scheme)), []).append(name)
        groups = {}
        for index, (described, names) in enumerate(sorted(by_scheme.items(), key=lambda item: -len(item[1]))):
            targets = ["Linear"] if len(by_scheme) == 1 else sorted(names)
            groups[f"group_{index}"] = {"targets": targets, **json.loads(described)}
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(unquantized),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            # For transformers, others ignore it: dense values while it loads. Otherwise weights stay FP8 until a hook
            # on the model's own call, which sentence-transformers passes by, and a layer that the file lacks cannot
            # be initialized.
            "dequantize": True,
        }


_FUSED = {"weight_input", "weight_output"}
_ATTENTION = {"q_attn", "k_cache"}


def _transforms(contents: Contents) -> list[tuple[str, Mapping[str, Any]]]:
    """The transforms that the config names."""
    config = contents.config.get("transform_config") or _NOTHING
    groups = config.get("config_groups") if isinstance(config, Mapping) else None
    found = groups if isinstance(groups, Mapping) else _NOTHING
    return [(name, transform) for name, transform in found.items() if isinstance(transform, Mapping)]


def _is_target(module: str, part: Mapping[str, Any]) -> bool:
    """Whether ``part`` of a transform is applied to a module; a class of modules, such as Linear, may be any."""
    if matching([module], _strings(part.get("ignore"))):
        return False
    targets = _strings(part.get("targets"))
    return bool(matching([module], targets)) or any(target[:1].isupper() for target in targets)


def _strings(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [str(item) for item in value] if isinstance(value, list) else []


def _all_groups(contents: Contents) -> Iterator[Mapping[str, Any]]:
    groups = contents.config.get("config_groups") or {}
    yield from (group for group in groups.values() if isinstance(group, Mapping))


def _groups(contents: Contents, module: str) -> list[Mapping[str, Any]]:
    """The config groups; those that name ``module`` come before those that name a class of modules."""
    return sorted(_all_groups(contents), key=lambda group: not matching([module], group.get("targets") or ()))


def _granularity(weights: Mapping[str, Any]) -> Granularity | None:
    strategy = weights.get("strategy")
    if strategy == "block":
        return block_granularity(weights.get("block_structure") or [128, 128])
    if strategy == "group" and weights.get("group_size"):
        return Granularity(1, int(weights["group_size"]))
    return {"tensor": TENSOR, "channel": ROW}.get(str(strategy))


def _activation(inputs: Mapping[str, Any] | None) -> Activation:
    if not inputs:
        return Activation(granularity=None)
    static = not inputs.get("dynamic", False)
    strategy = inputs.get("strategy")
    if strategy in ("group", "tensor_group") and inputs.get("group_size"):
        return Activation(granularity=Granularity(1, int(inputs["group_size"])), static=static)
    return Activation(granularity=ROW if strategy == "token" else TENSOR, static=static)


def _strategy(scheme: Scheme) -> str | None:
    weight = scheme.weight
    if weight in (TENSOR, ROW):
        return "tensor" if weight == TENSOR else "channel"
    if weight.rows is None or weight.cols is None:
        return None
    return "group" if weight.rows == 1 else "block"


def _is_mx(scheme: Scheme) -> bool:
    return scheme.weight == MX and scheme.scale_format == "ue8m0"


def _scale_dtype(layer: Written) -> torch.dtype:
    if _is_mx(layer.scheme):
        return torch.uint8
    return layer.scale_dtype if layer.scale_dtype in (torch.bfloat16, torch.float16) else torch.float32


def _group(scheme: Scheme) -> dict[str, Any]:
    """One group of the config, without its targets."""
    weight, activation = scheme.weight, scheme.activation
    strategy = _strategy(scheme)
    weights = {
        **_arguments(strategy or ""),
        "block_structure": [weight.rows, weight.cols] if strategy == "block" else None,
        "group_size": weight.cols if strategy == "group" else None,
    }
    inputs = None
    if activation is not None:
        kind = "tensor" if activation.rows is None else "token" if activation.cols is None else "group"
        inputs = {**_arguments(kind), "dynamic": not scheme.static, "group_size": activation.cols}
    if _is_mx(scheme):
        weights["scale_dtype"] = "torch.uint8"
        if inputs is not None:
            inputs["scale_dtype"] = "torch.uint8"
    file_format = "mxfp8-quantized" if _is_mx(scheme) else "float-quantized"
    return {"format": file_format, "weights": weights, "input_activations": inputs, "output_activations": None}


def _arguments(strategy: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
