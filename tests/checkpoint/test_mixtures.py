"""Every mixture of experts that transformers has: what is saved is what transformers itself loads."""

from __future__ import annotations

import json
from pathlib import Path

import mixtures
import pytest
import torch
from safetensors.torch import save_file

from fp8gemm import FP8GemmOptions, FP8Weight, enable_fp8_gemm, load_checkpoint, open_checkpoint, save_checkpoint

pytest.importorskip("transformers")
DISCARD = FP8GemmOptions(scheme="tensor", fp16_weight_storage="discard")
KINDS = mixtures.mixtures()


def dequantized(folder: Path, out: Path) -> Path:
    """The checkpoint without quantization, under the same names."""
    checkpoint = open_checkpoint(folder)
    out.mkdir()
    tensors = {name: checkpoint.dequantize(name, torch.bfloat16) for name in checkpoint.layers}
    tensors.update({name: checkpoint.read(key) for name, key in checkpoint.layout.plain.items()})
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("name", [name for name in KINDS if name not in mixtures.UNBUILT])
def test_transformers_loads_what_is_saved(name: str, tmp_path: Path) -> None:
    model = enable_fp8_gemm(mixtures.build(name), options=DISCARD)
    wanted = mixtures.dense(model)
    save_checkpoint(model, tmp_path / "fp8", format="fine-grained")
    plain = dequantized(tmp_path / "fp8", tmp_path / "plain")
    loaded, told = type(model).from_pretrained(plain, dtype=torch.bfloat16, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    assert mixtures.differing(mixtures.dense(loaded), wanted) == []
    own = mixtures.build(name, meta=True)
    load_checkpoint(own, tmp_path / "fp8")
    assert mixtures.differing(mixtures.dense(own), wanted) == []


@pytest.mark.parametrize("name", sorted(mixtures.UNBUILT))
def test_what_is_left_out_cannot_be_built(name: str) -> None:
    if name not in KINDS:
        pytest.skip(f"this transformers has no {name}")
    with pytest.raises(Exception, match=mixtures.UNBUILT[name]):
        mixtures.build(name)


# Published with one matrix for each expert: those stay FP8 on disk.
SINGLE = ["deepseek_v3", "deepseek_v4", "mixtral", "nemotron_h", "phimoe", "qwen3_moe", "olmoe", "glm4_moe"]


@pytest.mark.parametrize("name", SINGLE)
def test_experts_that_are_published_one_by_one_stay_fp8(name: str, tmp_path: Path) -> None:
    if name not in KINDS:
        pytest.skip(f"this transformers has no {name}")
    model = enable_fp8_gemm(mixtures.build(name), options=DISCARD)
    stacks = {
        name
        for name, parameter in model.named_parameters()
        if isinstance(parameter, FP8Weight) and parameter.dim() == 3
    }
    save_checkpoint(model, tmp_path)
    layers = open_checkpoint(tmp_path).layers
    assert stacks
    assert sum(".experts.0." in layer for layer in layers) >= len(stacks)
    own = mixtures.build(name, meta=True)
    load_checkpoint(own, tmp_path)
    assert all(isinstance(own.get_parameter(stack), FP8Weight) for stack in stacks)


@pytest.mark.parametrize("format", ["compressed-tensors", "fine-grained"])
@pytest.mark.parametrize("name", SINGLE)
def test_every_dense_matrix_of_the_file_is_named(name: str, format: str, tmp_path: Path) -> None:
    """A router is a linear layer in serving engines, which take for FP8 what the config does not name."""
    if name not in KINDS:
        pytest.skip(f"this transformers has no {name}")
    save_checkpoint(enable_fp8_gemm(mixtures.build(name), options=DISCARD), tmp_path, format=format)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    checkpoint = open_checkpoint(tmp_path)
    shapes = {key: checkpoint.contents.tensors[key].shape for key in checkpoint.layout.plain.values()}
    dense = {
        key.removesuffix(".weight") for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2
    }
    tables = {module for module in dense if "embed" in module}
    named = set(config["ignore"] if format == "compressed-tensors" else config["modules_to_not_convert"])
    assert any(module.endswith(("gate", "router")) for module in dense)
    assert dense - tables <= named
    assert not named & {layer.removesuffix(".weight") for layer in checkpoint.layers}
