"""NVIDIA ModelOpt exports, with their config in config.json, only in hf_quant_config.json or in a file's header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..scaled import BLOCK_128, ROW, TENSOR, Granularity
from .base import Activation, Contents, Format, Layout

_PREFIX = "model.diffusion_model."  # of single files for ComfyUI, with the config in their header


class ModelOpt(Format):
    name = "modelopt"
    strips = True

    def recognises(self, contents: Contents) -> str:
        if contents.method.startswith("modelopt"):
            return f"quant_method {contents.method}"
        if not contents.method and "quant_algo" in _settings(contents):
            return f"quant_algo {_settings(contents)['quant_algo']}"
        return ""

    def canonical(self, key: str) -> str:
        return key.removeprefix(_PREFIX)

    def granularities(self, contents: Contents, module: str) -> Sequence[Granularity]:
        return (BLOCK_128,) if "PB" in _algorithm(contents) else (BLOCK_128, ROW, TENSOR)

    def activation(self, contents: Contents, module: str, weight: Granularity) -> Activation:
        if weight.cols is not None or _algorithm(contents).endswith("_WO"):
            return Activation(granularity=None)
        if weight == TENSOR:
            return Activation(granularity=TENSOR)
        return Activation(granularity=ROW, static=False)

    def check(self, contents: Contents, layout: Layout) -> None:
        settings = _settings(contents)
        algorithm = _algorithm(contents)
        if algorithm and "FP8" not in algorithm and algorithm != "MIXED_PRECISION":
            layout.suspicious.append(f"quant_algo is {algorithm}, which is not FP8")
        excluded = settings.get("exclude_modules") or settings.get("ignore") or ()
        for name in layout.layers:
            module = name.removesuffix(".weight")
            if any(fnmatchcase(module, pattern) for pattern in excluded):
                layout.suspicious.append(f"{name} is FP8 although the config excludes it")


def _settings(contents: Contents) -> Mapping[str, Any]:
    """The config itself, or the ``quantization`` section of hf_quant_config.json."""
    inner = contents.config.get("quantization")
    return inner if isinstance(inner, Mapping) else contents.config


def _algorithm(contents: Contents) -> str:
    return str(_settings(contents).get("quant_algo") or "").upper()
