"""Which tensors are scales of what, and where a checkpoint says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BLOCKS, blocks, compressed, fp8, scales, write
from torch import nn

from fp8gemm import (
    ROW,
    CheckpointError,
    Granularity,
    convert_checkpoint,
    enable_fp8_gemm,
    load_checkpoint,
    save_checkpoint,
)
from fp8gemm.checkpoint import open_checkpoint
from fp8gemm.formats.shapes import even_blocks, granularity_of

N, K = 96, 128
W = fp8(N, K)
PLAIN = {"quant_method": "fp8", "activation_scheme": "dynamic"}

# ---- a model's own parameters


class Own(nn.Module):
    """A linear layer, and parameters that are called like scales."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.fc = nn.Linear(K, N)
        for index, (name, shape) in enumerate(shapes.items()):
            self.attn.register_parameter(name, nn.Parameter(scales(*shape, seed=index)))


@pytest.mark.parametrize("shape", [(), (1,), (64,)])
@pytest.mark.parametrize(
    "names",
    [
        ("q_scale", "k_scale", "v_scale"),
        ("kv_scale",),
        ("softmax_scale", "attn_scale"),
        ("gamma", "gamma_scale"),
        ("logit", "logit_scale"),
        ("bias_table", "bias_table_scale_inv"),
        ("input_scale", "output_scale", "weight_scale"),
        ("k_zero_point", "amax", "scale"),
    ],
)
def test_own_parameters_survive(names: tuple[str, ...], shape: tuple[int, ...], tmp_path: Path) -> None:
    model = Own(dict.fromkeys(names, shape))
    enable_fp8_gemm(model)
    save_checkpoint(model, tmp_path / "saved")
    convert_checkpoint(tmp_path / "saved", tmp_path / "converted")
    for folder in ("saved", "converted"):
        fresh = Own(dict.fromkeys(names, shape))
        with torch.no_grad():
            for name in names:
                getattr(fresh.attn, name).zero_()
        report = load_checkpoint(fresh, tmp_path / folder)
        assert (report.missing, report.unexpected, report.kv_scales, dict(report.unused_keys)) == ((), (), (), {})
        for name in names:
            assert torch.equal(getattr(fresh.attn, name), getattr(model.attn, name))


def test_norms_with_parameters_that_are_called_like_scales(tmp_path: Path) -> None:
    def net() -> nn.ModuleDict:
        norm = nn.LayerNorm(N)
        norm.scale, norm.weight_scale = nn.Parameter(torch.zeros(N)), nn.Parameter(torch.zeros(N))
        return nn.ModuleDict({"fc": nn.Linear(K, N), "norm": norm})

    model = net()
    with torch.no_grad():
        for index, parameter in enumerate(model["norm"].parameters()):
            parameter.copy_(scales(N, seed=index))
    enable_fp8_gemm(model)
    save_checkpoint(model, tmp_path)
    fresh = net()
    load_checkpoint(fresh, tmp_path)
    for name, parameter in model["norm"].named_parameters():
        assert torch.equal(fresh["norm"].get_parameter(name), parameter)


def test_own_scales_of_dense_matrices_are_filled(tmp_path: Path) -> None:
    """A stray scale beside a dense matrix is ignored, unless the model has a parameter of its name."""
    tensors = {"m.weight": W, "m.weight_scale": scales(N, 1), "d.weight": torch.ones(4, 4), "d.weight_scale": scales(4)}
    folder = write(tmp_path, tensors, compressed("channel", "token"))
    model = nn.ModuleDict({"m": nn.Linear(K, N, bias=False), "d": nn.Linear(4, 4, bias=False)})
    assert list(load_checkpoint(model, folder).unused_keys) == ["d.weight_scale"]
    own = nn.ModuleDict({"m": nn.Linear(K, N, bias=False), "d": nn.Linear(4, 4, bias=False)})
    own["d"].weight_scale = nn.Parameter(torch.zeros(4))  # type: ignore[assignment]
    assert load_checkpoint(own, folder).unused_keys == {}
    assert torch.equal(own["d"].weight_scale, scales(4))  # type: ignore[arg-type]


def test_without_quantization_nothing_is_a_scale(tmp_path: Path) -> None:
    tensors = {"m.weight": torch.ones(4, 4), "m.weight_scale": torch.ones(4), "attn.k_scale": torch.tensor(2.0)}
    checkpoint = open_checkpoint(write(tmp_path, tensors))
    assert set(checkpoint) == set(tensors)
    assert (checkpoint.unused_keys, dict(checkpoint.kv_scales)) == ({}, {})


# ---- scales of the key-value cache

KV = [
    "self_attn.k_scale", "self_attn.v_scale", "self_attn.q_scale", "self_attn.kv_scale", "self_attn.k_proj.k_scale",
    "self_attn.qkv_proj.v_scale", "self_attn.k_proj.output_scale", "self_attn.q_proj.output_scale",
    "self_attn.attn.k_scale", "self_attn.mla_attn._k_scale", "self_attn.k_cache.scale", "self_attn.v_cache.scale",
    "self_attn.q.scale", "self_attn.k_cache_scale", "self_attn.k_zero_point", "self_attn.prob_output_scale",
    "self_attn.softmax_scale", "mixer.k_proj.k_scale", "attention.kv_cache_scaling_factor",
    "attention.k_cache_scaling_factor", "self_attn.k_bmm_quantizer._amax", "self_attn.v_bmm_quantizer._scale",
    "attention.k_fake_quantizer.qscale_act", "self_attn.key_scale", "self_attn.value_cache_scale",
    "attention.kv_quant_orig_scale", "self_attn._v_scale_float", "self_attn.k_descale", "self_attn.fp8_v_scale",
    "attn.c_kv_scale", "attn.k_cache_amax", "attention.key.output_scale", "self_attn.past_key_scale",
]  # fmt: skip


@pytest.mark.parametrize("name", KV)
def test_scales_of_the_cache_are_kept_apart(name: str, tmp_path: Path) -> None:
    key = f"model.layers.0.{name}"
    tensors = {"m.weight": W, "m.weight_scale": scales(1).reshape(()), key: torch.tensor([0.25])}
    checkpoint = open_checkpoint(write(tmp_path, tensors, PLAIN))
    assert {name: float(scale) for name, scale in checkpoint.kv_scales.items()} == {key: 0.25}
    model = nn.ModuleDict({"m": nn.Linear(K, N, bias=False)})
    assert load_checkpoint(model, checkpoint).kv_scales == (key,)


def test_scales_of_the_cache_by_head_need_a_config_with_heads(tmp_path: Path) -> None:
    tensors = {"m.weight": W, "m.weight_scale": scales(1), "self_attn.k_scale": torch.ones(8, 1, 1)}
    config = {"text_config": {"num_attention_heads": 32, "num_key_value_heads": 8}}
    folder = write(tmp_path / "a", tensors, PLAIN, model_config=config)
    assert list(open_checkpoint(folder).kv_scales) == ["self_attn.k_scale"]
    assert dict(open_checkpoint(write(tmp_path / "b", tensors, PLAIN)).kv_scales) == {}


# ---- shapes

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 64}  # 64 + 16 + 16 rows
LLAMA = {"num_attention_heads": 2, "head_dim": 16}  # 3 x 32


@pytest.mark.parametrize("suffix", ["weight_scale", "scale_weight", "weight_scale_inv", "weights_scaling_factor"])
def test_groups_in_a_third_dimension(suffix: str, tmp_path: Path) -> None:
    scale = scales(N, K // 32, 1)
    checkpoint = open_checkpoint(write(tmp_path, {"m.weight": W, f"m.{suffix}": scale}) / "model.safetensors")
    assert torch.equal(checkpoint.dequantize("m.weight"), blocks(W, scale[..., 0], 1, 32))
    assert checkpoint.layers["m.weight"].granularity == Granularity(1, 32)
    assert granularity_of((N, K), (N, 1, 1)) == ROW
    assert granularity_of((N, K), (N, 3, 1)) is None


def test_even_blocks_are_told_from_their_grid_alone() -> None:
    sizes = [16, 32, 64, 128, 256]
    for n in range(16, 600, 16):
        for k in range(16, 600, 80):
            for size in sizes:
                grid = Granularity(size, size).scale_shape((n, k))
                found = even_blocks((n, k), grid)
                assert found is None or found == Granularity(size, size) or max(grid) == 1


def test_even_blocks_are_not_guessed_against_a_config(tmp_path: Path) -> None:
    tensors = {"m.weight": fp8(128, 128), "m.weight_scale": scales(2, 2)}
    assert open_checkpoint(write(tmp_path / "a", tensors)).layers["m.weight"].granularity == Granularity(64, 64)
    with pytest.raises(CheckpointError, match="fits no scale"):
        open_checkpoint(write(tmp_path / "b", tensors, PLAIN))


@pytest.mark.parametrize(
    ("name", "config", "heights"),
    [
        ("self_attn.qkv_proj", HEADS, (64, 16, 16)),
        ("self_attn.qkv_proj", {"text_config": LLAMA}, (32, 32, 32)),
        ("mlp.gate_up_proj", {}, (48, 48)),
    ],
)
@pytest.mark.parametrize("column", [False, True])
def test_partitions_of_joined_projections(
    name: str, config: dict[str, Any], heights: tuple[int, ...], column: bool, tmp_path: Path
) -> None:
    scale, inputs = scales(len(heights)), torch.tensor([0.25, 0.5, 0.125][: len(heights)])
    tensors = {f"{name}.weight": W, f"{name}.weight_scale": scale[:, None] if column else scale}
    tensors[f"{name}.input_scale"] = inputs
    checkpoint = open_checkpoint(
        write(tmp_path, tensors, {**PLAIN, "activation_scheme": "static"}, model_config=config)
    )
    rows = torch.cat([value.expand(height) for value, height in zip(scale, heights, strict=True)])
    assert torch.equal(checkpoint.dequantize(f"{name}.weight"), W.float() * rows[:, None])
    assert checkpoint.input_scale(f"{name}.weight") == torch.tensor(0.5)


def test_partitions_of_unknown_heights_are_refused(tmp_path: Path) -> None:
    for index, config in enumerate(({}, {"num_attention_heads": 7, "head_dim": 16})):
        tensors = {"qkv_proj.weight": W, "qkv_proj.weight_scale": scales(3)}
        with pytest.raises(CheckpointError, match=r"qkv_proj\.weight_scale has shape \[3\]"):
            open_checkpoint(write(tmp_path / str(index), tensors, PLAIN, model_config=config))


# ---- where the config is


def nested(config: dict[str, Any], depth: int) -> dict[str, Any]:
    for index in range(depth):
        config = {f"part_{index}": config, "other": {}}
    return config


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_configs_of_parts_of_a_model(depth: int, tmp_path: Path) -> None:
    config = nested({"quantization_config": {**BLOCKS, "weight_block_size": [64, 64]}}, depth)
    folder = write(tmp_path, {"m.weight": W, "m.weight_scale_inv": scales(2, 2)}, model_config=config)
    assert torch.equal(open_checkpoint(folder).dequantize("m.weight"), blocks(W, scales(2, 2), 64, 64))


@pytest.mark.parametrize("name", ["quantization_config.json", "quant_config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_configs_in_files_of_their_own(name: str, wrapped: bool, tmp_path: Path) -> None:
    folder = write(
        tmp_path / "in", {"m.weight": W, "m.weight_scale_inv": scales(2, 2)}, model_config={"model_type": "x"}
    )
    config: dict[str, Any] = {**BLOCKS, "weight_block_size": [64, 64]}
    (folder / name).write_text(json.dumps({"quantization_config": config} if wrapped else config))
    assert torch.equal(open_checkpoint(folder).dequantize("m.weight"), blocks(W, scales(2, 2), 64, 64))
    convert_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out" / name).exists(), "it describes the old format"


@pytest.mark.parametrize("key", ["quantization_config", "hf_quant_config"])
def test_modelopt_configs_in_a_header(key: str, tmp_path: Path) -> None:
    config = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["x"]}}
    tensors = {"model.diffusion_model.m.weight": W, "model.diffusion_model.m.weight_scale": scales(1).reshape(())}
    tensors["model.diffusion_model.m.input_scale"] = torch.tensor(0.5)
    path = write(tmp_path, tensors, metadata={key: json.dumps(config), "config": "not JSON"}) / "model.safetensors"
    checkpoint = open_checkpoint(path)
    assert (checkpoint.format.name, checkpoint.recognised_by) == ("modelopt", "quant_algo FP8")
    assert torch.equal(checkpoint.dequantize("m.weight"), W.float() * scales(1))
    assert checkpoint.input_scale("m.weight") == torch.tensor(0.5)


def test_tensorrt_llms_factors_multiply(tmp_path: Path) -> None:
    tensors = {"m.weight": W, "m.weights_scaling_factor": scales(1), "m.activation_scaling_factor": torch.tensor([0.5])}
    checkpoint = open_checkpoint(write(tmp_path, tensors) / "model.safetensors")
    assert checkpoint.format.name == "tensorrt-llm"
    assert torch.equal(checkpoint.dequantize("m.weight"), W.float() * scales(1))
    assert checkpoint.input_scale("m.weight") == torch.tensor(0.5)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "LlamaForCausalLM"}))
    with pytest.raises(CheckpointError, match="TensorRT-LLM checkpoint"):
        open_checkpoint(tmp_path)
