"""``fp8`` in Hugging Face configs: blocks as DeepSeek publishes them, and vLLM's plain per-tensor variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..numerics import encode_ue8m0
from ..scaled import BLOCK_128, GROUP_128, MX, ROW, TENSOR, Granularity, ScaledTensor
from .base import UE8M0_DTYPES, Activation, Contents, Format, Layout, TensorInfo, Written
from .shapes import block_granularity


class FineGrained(Format):
    """``weight_scale_inv``: a multiplier, despite its name."""

    name = "fine-grained"
    writable = True

    def recognises(self, contents: Contents) -> str:
        if contents.method in ("fp8", "mxfp8"):
            return "" if _is_plain(contents) else f"quant_method {contents.method}"
        if not contents.config and contents.holds_fp8 and _ends(contents, "weight_scale_inv"):
            return "tensors named weight_scale_inv"
        if not contents.config and contents.holds_fp8 and _ends(contents, "qscale_weight"):
            return "tensors named qscale_weight"
        return ""

    def granularities(self, contents: Contents, module: str) -> Sequence[Granularity]:
        block = contents.config.get("weight_block_size", "absent")
        if block is None:
            return ()
        if block != "absent":
            return (block_granularity(block),)
        return (MX,) if contents.method == "mxfp8" else (BLOCK_128,)

    def activation(self, contents: Contents, module: str, weight: Granularity) -> Activation:
        scheme = contents.config.get("activation_scheme")
        static = None if scheme is None else scheme == "static"
        if weight.rows is not None and weight.cols is not None:
            return Activation(granularity=Granularity(1, weight.cols), static=False)
        return Activation(granularity=TENSOR if weight.rows is None else ROW, static=static)

    def infers_blocks(self, contents: Contents, module: str) -> bool:
        return not contents.config

    def ue8m0(self, contents: Contents, scale: TensorInfo) -> bool:
        return scale.dtype in UE8M0_DTYPES or contents.config.get("scale_fmt") == "ue8m0"

    def check(self, contents: Contents, layout: Layout) -> None:
        if not contents.config and layout.layers:
            layout.suspicious.append("FP8 weights but no quantization_config: blocks of 128 x 128 are assumed")
        block = contents.config.get("weight_block_size")
        for name, layer in layout.layers.items():
            if block and layer.granularity in (TENSOR, ROW):
                layout.suspicious.append(f"{name} has {layer.granularity} scales; the config says blocks {block}")
            if contents.config.get("activation_scheme") == "static" and not layer.scheme.static:
                layout.suspicious.append(f"{name} has no activation scale; the config says activations are static")

    def refuses(self, layers: Mapping[str, Written]) -> list[str]:
        reasons = []
        for name, layer in layers.items():
            scheme = layer.scheme
            if layer.dtype != torch.float8_e4m3fn:
                reasons.append(f"{name}: fine-grained stores float8_e4m3fn, found {layer.dtype}")
            if len(layer.shape) != 2:
                reasons.append(f"{name}: fine-grained stores matrices [N, K], found shape {list(layer.shape)}")
            blocks = scheme.weight.rows is not None and scheme.weight.cols is not None
            if not blocks and scheme.weight != TENSOR:
                reasons.append(f"{name}: fine-grained supports blocks or one scale per tensor, found {scheme.weight}")
            elif scheme.activation is None:
                reasons.append(f"{name}: fine-grained requires quantized activations, found weight-only")
            elif blocks and (scheme.static or scheme.activation != Granularity(1, scheme.weight.cols)):
                reasons.append(f"{name}: blocks require dynamic activations 1x{scheme.weight.cols}, found {scheme}")
        kinds = {(layer.scheme.weight, layer.scheme.static, layer.scheme.scale_format) for layer in layers.values()}
        if len(kinds) > 1:
            found = ", ".join(sorted({str(layer.scheme) for layer in layers.values()}))
            reasons.append(f"fine-grained requires the same scheme for all layers, found {len(kinds)}: {found}")
        return reasons

    def stored(self, name: str, layer: Written) -> dict[str, TensorInfo]:
        scheme = layer.scheme
        grid = () if scheme.weight == TENSOR else scheme.weight.scale_shape(layer.shape)
        scale = torch.float8_e8m0fnu if scheme.scale_format == "ue8m0" else torch.float32
        tensors = {
            f"{name}.weight": TensorInfo(dtype=layer.dtype, shape=layer.shape),
            f"{name}.weight_scale_inv": TensorInfo(dtype=scale, shape=grid),
        }
        if scheme.static:
            tensors[f"{name}.activation_scale"] = TensorInfo(dtype=torch.float32, shape=())
        return tensors

    def write(
        self, name: str, layer: Written, weight: ScaledTensor, input_scale: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        scale = weight.scale.reshape(()) if layer.scheme.weight == TENSOR else weight.scale
        if layer.scheme.scale_format == "ue8m0":
            scale = encode_ue8m0(scale).view(torch.float8_e8m0fnu)
        tensors = {f"{name}.weight": weight.data, f"{name}.weight_scale_inv": scale}
        if layer.scheme.static and input_scale is not None:
            tensors[f"{name}.activation_scale"] = input_scale.to(torch.float32).reshape(())
        return tensors

    def write_config(self, layers: Mapping[str, Written], unquantized: Sequence[str]) -> dict[str, Any]:
        scheme = next(iter(layers.values())).scheme
        block = None if scheme.weight == TENSOR else [scheme.weight.rows, scheme.weight.cols]
        config = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "static" if scheme.static else "dynamic",
            "weight_block_size": block,
            "modules_to_not_convert": sorted(unquantized),
        }
        return {**config, "scale_fmt": "ue8m0"} if scheme.scale_format == "ue8m0" else config


class Plain(Format):
    """``fp8`` of AutoFP8 and vLLM, and scaled FP8 of unknown origin: ``weight_scale`` next to the weight."""

    name = "plain"
    methods: ClassVar[tuple[str, ...]] = ()

    def recognises(self, contents: Contents) -> str:
        if contents.method == "fp8" and _is_plain(contents):
            return "quant_method fp8 with tensors named weight_scale"
        if contents.holds_fp8 and (contents.method or _ends(contents, "weight_scale")):
            return f"FP8 weights with scales, quant_method {contents.method or 'not given'}"
        return ""

    def granularities(self, contents: Contents, module: str) -> Sequence[Granularity]:
        block = contents.config.get("weight_block_size")
        return (block_granularity(block) if block else BLOCK_128,)

    def infers_blocks(self, contents: Contents, module: str) -> bool:
        return not contents.config

    def allows_raw(self, contents: Contents) -> bool:
        return contents.raw or (not contents.config and contents.model_config is None)

    def activation(self, contents: Contents, module: str, weight: Granularity) -> Activation:
        scheme = contents.config.get("activation_scheme")
        static = None if scheme is None else scheme == "static"
        if weight.cols is not None:
            return Activation(granularity=GROUP_128, static=False)
        return Activation(granularity=TENSOR if weight == TENSOR else ROW, static=static)

    def check(self, contents: Contents, layout: Layout) -> None:
        if contents.method not in ("fp8", "", *self.methods):
            layout.suspicious.append(f"quant_method {contents.method} is unknown; its tensors were read by name")
        if not contents.config and layout.layers:
            layout.suspicious.append("FP8 weights but no quantization_config")
        for name, layer in layout.layers.items():
            if layer.scale is None:
                layout.suspicious.append(f"{name} has no scale and was read with a scale of 1")
            if contents.config.get("activation_scheme") == "static" and not layer.scheme.static:
                layout.suspicious.append(f"{name} has no input scale; the config says activations are static")


class Fbgemm(Format):
    """FBGEMM's per-row scales, as published with Llama 3.1 and 4; stacked experts are transposed, ``[E, K, N]``."""

    name = "fbgemm"

    def recognises(self, contents: Contents) -> str:
        return "quant_method fbgemm_fp8" if contents.method == "fbgemm_fp8" else ""

    def granularities(self, contents: Contents, module: str) -> Sequence[Granularity]:
        # In three dimensions only: (E, N, 1) and (E, 1, N) both hold one scale per column of [E, K, N].
        return (Granularity(None, 1),) if ".experts." in f"{module}." else (ROW,)

    def activation(self, contents: Contents, module: str, weight: Granularity) -> Activation:
        return Activation(granularity=ROW, static=False)


def _is_plain(contents: Contents) -> bool:
    return _ends(contents, "weight_scale") and not _ends(contents, "weight_scale_inv")


def _ends(contents: Contents, name: str) -> bool:
    return any(key.endswith(f".{name}") for key in contents.tensors)
