"""A tiny model of every mixture of experts that the installed transformers has, found in its sources."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from fp8gemm import FP8Weight

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LARGEST = 60_000_000
# What shrinking by the names of numbers does not tell.
ESPECIALLY: dict[str, dict[str, Any]] = {
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
}
# Those whose experts are another model's.
COMPOSED = ("kimi_k25", "nemo_speechlm")
# Those that cannot be made tiny that way, with a part of what transformers says.
UNBUILT = {
    "deepseek_ocr2": "not subscriptable",
    "diffusion_gemma": "per-layer attribute",
    "dots3_note": "adapter_input_size|per-layer attribute",
    "ernie4_5_vl_moe": "expanded size",
    "gemma4": "per-layer attribute",
    "hy_v4_vl": "mrope_section",
    "hy_v4_vl_text": "mrope_section",
    "inkling_mm_model": "million parameters",
    "qwen3_omni_moe": "shared_expert_intermediate_size",
    "qwen4_exp": "unsupported operand",
    "qwen4_exp_text": "unsupported operand",
}


@cache
def tiny() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("tiny_models")
    finally:
        sys.path.remove(str(BENCHMARKS))


@cache
def mixtures() -> list[str]:
    """The model types with experts."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    root = Path(transformers.__file__).parent / "models"
    found = [name for name in COMPOSED if name in tiny().architectures()]
    for name in tiny().architectures():
        sources = (root / model_type_to_module_name(name)).glob("modeling_*.py")
        if any(re.search(r"^class \w*Experts?\w*\(nn\.Module\)", source.read_text(), re.M) for source in sources):
            found.append(name)
    return sorted(found)


def config_of(name: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with mock.patch.dict(tiny().ESPECIALLY, ESPECIALLY):
        return _fewer(tiny().shrunk(CONFIG_MAPPING[name], name, width=True, tied=False))


def _fewer(config: Any) -> Any:
    """Few experts where a configuration has another name for their number."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            _fewer(value)
        elif type(value) is int and re.fullmatch(r"num_experts_per_tok(en)?|moe_topk", key):
            setattr(config, key, min(value, 2))
        elif type(value) is int and re.fullmatch(r"((num|n)_(routed_|local_)?experts|zero_expert_num)", key):
            setattr(config, key, min(value, 4))
        elif key == "num_expert_group":
            setattr(config, key, 1)
    return config


def build(name: str, *, meta: bool = False) -> nn.Module:
    """A tiny model in bfloat16."""
    config = config_of(name)
    kind = tiny().classes(name)[0]
    with torch.device("meta"):
        model = kind(config)
    if (size := sum(parameter.numel() for parameter in model.parameters())) > LARGEST:
        raise tiny().Unbuilt(f"{size / 1e6:.0f} million parameters")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Casting complex values to real")  # rotary embeddings of Llama-4
        if meta:
            return model.to(torch.bfloat16)
        torch.manual_seed(0)
        model = tiny().filled(kind(config)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # what only a checkpoint fills
            if not torch.isfinite(parameter).all() or parameter.abs().max() > 1e4:
                parameter.normal_(std=0.05)
    return model


def dense(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a model's state dict is without FP8, in bfloat16."""
    persistent = set(model.state_dict())
    found = {name: _values(parameter) for name, parameter in model.named_parameters()}
    found.update({name: buffer for name, buffer in model.named_buffers() if name in persistent})
    return {name: tensor.to(torch.bfloat16) for name, tensor in found.items()}


def _values(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.dequantize() if isinstance(parameter, FP8Weight) else parameter.detach()


def differing(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    same = {
        name
        for name, tensor in wanted.items()
        if name in found
        and found[name].shape == tensor.shape
        and torch.equal(found[name].nan_to_num(), tensor.nan_to_num())
    }
    return sorted(wanted.keys() - same)
