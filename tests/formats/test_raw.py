"""FP8 without a known scale: values themselves only where nothing else is possible."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BLOCKS, fp8, scales, write
from torch import nn

from fp8gemm import CheckpointError, convert_checkpoint, load_checkpoint
from fp8gemm.checkpoint import open_checkpoint
from fp8gemm.cli import main

N, K = 64, 128
W = fp8(N, K)
FP8 = torch.float8_e4m3fn

# Names and shapes that tools give to scales, or could: nothing says whether they multiply or divide.
UNKNOWN: dict[str, torch.Tensor] = {
    "m.scales": scales(N, 1),
    "m.weight_scales": scales(N),
    "m.scale_inv": torch.tensor(0.5),
    "m.weight_scaling": torch.tensor([0.5]),
    "m.weight.scale": torch.tensor(0.5),
    "m.weight_quantizer._scale": torch.tensor(0.5),
    "m.weight_quantizer.amax": torch.tensor(0.5),
    "m.absmax": scales(N),
    "m.dequant": scales(1, K),
    "m.w_s": scales(N, 1),
    "m.input_scale": torch.tensor(0.5),
    "m.svd_up": torch.ones(N, 4),
    "m.zeros": torch.zeros(N),
    "m_scale": torch.tensor(0.5),
    "m_scales": scales(N),
    "scales.m": scales(N, 1),
    "scale.m.weight": torch.tensor(0.5),
    "m.weight:scale": torch.tensor(0.5),
}
# Own parameters of models, among them some that are called like scales.
OWN: dict[str, torch.Tensor] = {
    "text.logit_scale": torch.tensor(4.6),
    "logit_scale": torch.tensor(4.6).to(FP8),
    "layer_scale": torch.ones(N),
    "norm.scale": torch.ones(N),
    "norm.query_norm.scale": torch.ones(N).to(FP8),
    "embed_scale": torch.tensor(8.0),
    "q_scale": torch.ones(16),
    "scale_shift_table": fp8(6, N),
    "m.bias": torch.ones(N).to(FP8),
    "m.e_score_correction_bias": torch.ones(N),
    "m.gamma": torch.ones(N).to(FP8),
    "mm.weight_scale_norm.weight": torch.ones(N),
}


def single(folder: Path, tensors: dict[str, torch.Tensor], prefix: str = "") -> Path:
    return write(folder, {prefix + key: tensor for key, tensor in tensors.items()}) / "model.safetensors"


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.blocks.0."])
def test_what_may_be_a_scale_is_refused_by_its_name(name: str, prefix: str, tmp_path: Path) -> None:
    if prefix and name.startswith("scale"):
        prefix = ""  # a tree of scales has the model's names below it
    path = single(tmp_path, {"m.weight": W, name: UNKNOWN[name]}, prefix)
    for raw in (False, True):
        with pytest.raises(CheckpointError, match=rf"m\.weight (is|cannot be read).*{re.escape(name)}"):
            open_checkpoint(path, raw=raw)[f"{prefix}m.weight".removeprefix("model.diffusion_model.")]


@pytest.mark.parametrize("name", OWN)
def test_own_parameters_do_not_hide_a_raw_cast(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(single(tmp_path, {"m.weight": W, name: OWN[name]}))
    assert torch.equal(checkpoint.dequantize("m.weight"), W.float())
    assert torch.equal(checkpoint.dequantize(name), OWN[name].float())
    assert checkpoint.layout.suspicious == ["no scales: read as a raw cast, with every scale 1"]


def test_tables_that_are_called_alike_are_no_scales_of_each_other(tmp_path: Path) -> None:
    """LTX-2 has a table for video, and one with fewer columns for audio."""
    tensors = {"m.weight": W, "scale_shift_table": fp8(6, 128), "audio_scale_shift_table": torch.ones(6, 64)}
    tensors |= {f"blocks.0.{key}": tensor for key, tensor in tensors.items()}
    checkpoint = open_checkpoint(single(tmp_path, tensors))
    assert torch.equal(checkpoint.dequantize("scale_shift_table"), fp8(6, 128).float())
    assert set(checkpoint) == set(tensors)


def test_convolutions_need_an_explanation_too(tmp_path: Path) -> None:
    conv = torch.ones(8, 4, 3, 3).to(FP8)
    assert torch.equal(open_checkpoint(single(tmp_path / "a", {"c.weight": conv}))["c.weight"], conv)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"c\.weight is .*c\.scales"):
        open_checkpoint(single(tmp_path / "b", {"c.weight": conv, "c.scales": torch.ones(8)}))


def test_bare_matrices_keep_their_names(tmp_path: Path) -> None:
    path = single(tmp_path, {"m.weight": W, "scale_shift_table": fp8(6, N), "b.0.modulation": fp8(6, N)})
    for format in ("compressed-tensors", "comfy"):
        convert_checkpoint(path, tmp_path / format, format=format)
        converted = open_checkpoint(tmp_path / format)
        assert set(converted) == {"m.weight", "scale_shift_table", "b.0.modulation"}
        assert list(converted.layers) == ["m.weight"]
        assert torch.equal(converted.dequantize("scale_shift_table"), fp8(6, N).float())


def test_bare_matrices_with_a_scale_keep_their_names_and_values(tmp_path: Path) -> None:
    tensors = {"m.weight": W, "m.weight_scale": scales(N, 1), "attn.in_proj_weight": W}
    path = write(
        tmp_path / "in", {**tensors, "attn.in_proj_weight_scale": scales(N, 1, seed=3)}, {"quant_method": "fp8"}
    )
    report = convert_checkpoint(path, tmp_path / "out")
    assert list(report.kept) == ["attn.in_proj_weight"]
    converted = open_checkpoint(tmp_path / "out")
    assert list(converted.layers) == ["m.weight"]
    assert torch.equal(converted.dequantize("attn.in_proj_weight"), W.float() * scales(N, 1, seed=3))


# ---- folders

CONFIGS: dict[str, dict[str, Any]] = {
    "diffusers": {"_class_name": "FluxTransformer2DModel"},
    "transformers": {"model_type": "t5", "dtype": "float8_e4m3fn"},
    "older transformers": {"model_type": "t5", "torch_dtype": "torch.float8_e5m2"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_models_cast_as_a_whole_are_read_from_folders(name: str, tmp_path: Path) -> None:
    tensors = {"m.weight": W, "m.bias": torch.ones(N).to(FP8)}
    folder = write(tmp_path, tensors, model_config=CONFIGS[name])
    model = nn.ModuleDict({"m": nn.Linear(K, N)})
    load_checkpoint(model, folder)
    assert torch.equal(model["m"].weight.dequantize(), W.float())  # type: ignore[operator, union-attr]
    assert torch.equal(model["m"].bias, torch.ones(N))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "bias"),
    [({"_class_name": "FluxTransformer2DModel"}, torch.ones(N)), ({"model_type": "llama"}, torch.ones(N).to(FP8))],
)
def test_other_folders_are_read_when_told(config: dict[str, Any], bias: torch.Tensor, tmp_path: Path) -> None:
    folder = write(tmp_path, {"m.weight": W, "m.bias": bias}, model_config=config)
    with pytest.raises(CheckpointError, match=r"raw cast.*open_checkpoint\(\.\.\., raw=True\)"):
        open_checkpoint(folder)
    assert torch.equal(open_checkpoint(folder, raw=True).dequantize("m.weight"), W.float())


def test_raw_layers_of_a_scaled_folder_are_read_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"m.weight": fp8(128, 128), "m.weight_scale_inv": scales(1, 1), "head.weight": W}
    folder = write(tmp_path, tensors, BLOCKS)
    with pytest.raises(CheckpointError, match=r"head\.weight .* no scale"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, raw=True)
    assert torch.equal(checkpoint.dequantize("head.weight"), W.float())
    assert main(["inspect", str(folder)]) == 1
    assert "raw=True" in capsys.readouterr().err
    assert main(["inspect", "--raw", "--json", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["layers"]["head.weight"]["scale"] is None
