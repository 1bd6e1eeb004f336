"""Every row of the table of formats is read bit for bit, and what is ambiguous or broken is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BLOCKS, blocks, compressed, e8m0, fp8, powers, scales, write
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8gemm import BLOCK_128, GROUP_128, MX, ROW, TENSOR, CheckpointError, Granularity, ScaledTensor
from fp8gemm.checkpoint import open_checkpoint
from fp8gemm.formats import FORMATS, Contents, TensorInfo, detect, join_rows, scan
from fp8gemm.formats.shapes import granularity_of
from fp8gemm.numerics import dequantize

N, K = 192, 320  # 1.5 and 2.5 blocks
W = fp8(N, K)
ROWS, ONE, GRID = scales(N, 1), scales(1, seed=5), scales(2, 3, seed=6)
POWERS = powers(2, 3)
MX_POWERS = powers(N, K // 32)
ANSWERS = {
    "row": W.float() * ROWS,
    "tensor": W.float() * ONE,
    "block": blocks(W, GRID, 128, 128),
    "powers": blocks(W, POWERS, 128, 128),
    "mx": blocks(W, MX_POWERS, 1, 32),
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "config_groups": {"group_0": {"targets": ["Linear"]}}}
AO = {
    "_type": "Float8Tensor",
    "_data": {"block_size": [1, K], "act_quant_kwargs": {"_data": {"granularity": {"_type": "PerRow"}}}},
}
AO_TENSOR = {
    "_type": "Float8Tensor",
    "_data": {"block_size": [N, K], "act_quant_kwargs": {"_data": {"granularity": {"_type": "PerTensor"}}}},
}

# format, tensors beside those of layer "m" (weight W unless named), config, header metadata, answer, granularity,
# activation ("static" where an input scale of 0.5 counts)
Case = tuple[str, dict[str, torch.Tensor], "dict[str, Any] | None", dict[str, str], str, Granularity, str]
CASES: dict[str, Case] = {
    "ct-channel": ("compressed-tensors", {"weight_scale": ROWS}, compressed("channel", "token"), {}, "row", ROW, "row"),
    "ct-static": (
        "compressed-tensors",
        {"weight_scale": ONE, "input_scale": torch.tensor([0.5])},
        compressed("tensor", "tensor"),
        {},
        "tensor",
        TENSOR,
        "static",
    ),
    "ct-weight-only": (
        "compressed-tensors", {"weight_scale": ROWS}, compressed("channel", None), {}, "row", ROW, "kept",
    ),
    "ct-block": (
        "compressed-tensors",
        {"weight_scale": GRID},
        compressed("block", "token", block_structure=[128, 128]),
        {},
        "block",
        BLOCK_128,
        "row",
    ),
    "ct-mxfp8": (
        "compressed-tensors",
        {"weight_scale": e8m0(MX_POWERS)},
        compressed("group", "token", group_size=32),
        {},
        "mx",
        MX,
        "row",
    ),
    "ct-frozen-zero-point": (
        "compressed-tensors",
        {"weight_scale": ROWS, "weight_zero_point": torch.zeros(N, 1, dtype=torch.float8_e4m3fn)},
        {**compressed("channel", "token"), "quantization_status": "frozen"},
        {},
        "row",
        ROW,
        "row",
    ),
    "fine-grained": ("fine-grained", {"weight_scale_inv": GRID}, BLOCKS, {}, "block", BLOCK_128, "1x128"),
    "fine-grained-no-size": (
        "fine-grained", {"weight_scale_inv": GRID}, {"quant_method": "fp8"}, {}, "block", BLOCK_128, "1x128",
    ),
    "fine-grained-no-config": ("fine-grained", {"weight_scale_inv": GRID}, None, {}, "block", BLOCK_128, "1x128"),
    "fine-grained-powers": (
        "fine-grained", {"weight_scale_inv": POWERS}, {**BLOCKS, "scale_fmt": "ue8m0"}, {}, "powers", BLOCK_128,
        "1x128",
    ),
    "fine-grained-e8m0-dot-scale": (
        "fine-grained",
        {"scale": e8m0(POWERS).view(torch.float8_e8m0fnu)},
        {**BLOCKS, "scale_fmt": "ue8m0"},
        {},
        "powers",
        BLOCK_128,
        "1x128",
    ),
    "fine-grained-e8m0-bytes": (
        "fine-grained", {"weight_scale_inv": e8m0(POWERS)}, BLOCKS, {}, "powers", BLOCK_128, "1x128",
    ),
    "fine-grained-mxfp8": (
        "fine-grained", {"weight_scale_inv": e8m0(MX_POWERS)}, {"quant_method": "mxfp8"}, {}, "mx", MX, "1x32",
    ),
    "fine-grained-static": (
        "fine-grained",
        {"weight_scale_inv": ONE.reshape(()), "activation_scale": torch.tensor(0.5)},
        {**BLOCKS, "weight_block_size": None, "activation_scheme": "static"},
        {},
        "tensor",
        TENSOR,
        "static",
    ),
    "mistral-native": (
        "fine-grained",
        {"qscale_weight": ONE.reshape(()), "qscale_act": torch.tensor(0.5)},
        None,
        {},
        "tensor",
        TENSOR,
        "static",
    ),
    "plain-static": (
        "plain",
        {"weight_scale": ONE.reshape(()), "input_scale": torch.tensor(0.5)},
        {"quant_method": "fp8", "activation_scheme": "static"},
        {},
        "tensor",
        TENSOR,
        "static",
    ),
    "plain-dynamic": (
        "plain", {"weight_scale": ONE}, {"quant_method": "fp8", "activation_scheme": "dynamic"}, {}, "tensor", TENSOR,
        "tensor",
    ),
    "plain-rows-in-bf16": (
        "plain",
        {"weight_scale": ROWS.bfloat16()},
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {},
        "row-bf16",
        ROW,
        "row",
    ),
    "unknown-tool": ("plain", {"weight_scale": ROWS}, {"quant_method": "quark"}, {}, "row", ROW, "row"),
    "fbgemm": (
        "fbgemm", {"weight_scale": ROWS}, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, {}, "row",
        ROW, "row",
    ),
    "modelopt": (
        "modelopt", {"weight_scale": ONE.reshape(()), "input_scale": torch.tensor(0.5)}, MODELOPT, {}, "tensor",
        TENSOR, "static",
    ),
    "modelopt-channel": (
        "modelopt", {"weight_scale": ROWS.flatten()}, {**MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, {},
        "row", ROW, "row",
    ),
    "modelopt-blocks": (
        "modelopt", {"weight_scale": GRID.reshape(2, 1, 3, 1)}, {**MODELOPT, "quant_algo": "FP8_PB_WO"}, {}, "block",
        BLOCK_128, "kept",
    ),
    "torchao-row": (
        "torchao",
        {"_weight_qdata": W, "_weight_scale": ROWS},
        {"quant_method": "torchao"},
        {"m.weight": json.dumps(AO)},
        "row",
        ROW,
        "row",
    ),
    "torchao-tensor": (
        "torchao",
        {"_weight_qdata": W, "_weight_scale": ONE.reshape(1, 1)},
        {"quant_method": "torchao"},
        {"m.weight": json.dumps(AO_TENSOR)},
        "tensor",
        TENSOR,
        "tensor",
    ),
}  # fmt: skip
ANSWERS["row-bf16"] = W.float() * ROWS.bfloat16().float()


def written(folder: Path, case: Case) -> Path:
    _, parts, config, metadata, *_ = case
    tensors = {f"m.{name}": tensor for name, tensor in parts.items()}
    if "_weight_qdata" not in parts:
        tensors["m.weight"] = W
    tensors["norm.weight"] = torch.ones(N, dtype=torch.bfloat16)
    return write(folder, tensors, config, metadata=metadata)


@pytest.mark.parametrize("name", CASES)
def test_reads_bit_for_bit(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    format, _, _, _, answer, granularity, activation = case
    checkpoint = open_checkpoint(written(tmp_path, case))
    assert checkpoint.format.name == format
    assert set(checkpoint) == {"m.weight", "norm.weight"}
    scaled = checkpoint["m.weight"]
    assert isinstance(scaled, ScaledTensor)
    assert scaled.granularity == granularity
    assert torch.equal(scaled.data.view(torch.uint8), W.view(torch.uint8))
    assert torch.equal(checkpoint.dequantize("m.weight"), ANSWERS[answer])
    assert torch.equal(checkpoint.dequantize("m.weight", torch.bfloat16), ANSWERS[answer].to(torch.bfloat16)), (
        "computed in float32 and rounded once"
    )
    scheme = checkpoint.layers["m.weight"].scheme
    if activation == "static":
        assert scheme.static
        assert checkpoint.input_scale("m.weight") == torch.tensor(0.5)
    else:
        assert not scheme.static
        assert ("kept" if scheme.activation is None else str(scheme.activation)) == activation
        assert checkpoint.input_scale("m.weight") is None
    assert checkpoint.unused_keys == {}


def test_declared_powers_of_two_are_known(tmp_path: Path) -> None:
    for name in ("fine-grained-powers", "fine-grained-e8m0-dot-scale", "fine-grained-e8m0-bytes", "ct-mxfp8"):
        checkpoint = open_checkpoint(written(tmp_path / name, CASES[name]))
        assert checkpoint.layers["m.weight"].scheme.scale_format == "ue8m0", name
    checkpoint = open_checkpoint(written(tmp_path / "other", CASES["fine-grained"]))
    assert checkpoint.layers["m.weight"].scheme.scale_format == "float32"


def test_modelopt_with_only_its_own_config(tmp_path: Path) -> None:
    write(tmp_path, {"m.weight": W, "m.weight_scale": ONE.reshape(())}, model_config={"model_type": "llama"})
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}})
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format.name == "modelopt"
    assert torch.equal(checkpoint.dequantize("m.weight"), ANSWERS["tensor"])


def test_block_sizes_come_from_the_config_not_from_the_shapes(tmp_path: Path) -> None:
    """192 rows with 2 scales are blocks of 128 and 64, not of 96."""
    checkpoint = open_checkpoint(written(tmp_path / "a", CASES["fine-grained"]))
    assert torch.equal(
        checkpoint.dequantize("m.weight")[96:128], W.float()[96:128] * GRID[0].repeat_interleave(128)[:K]
    )
    other = scales(3, 5)
    config = {**BLOCKS, "weight_block_size": [64, 64]}
    checkpoint = open_checkpoint(write(tmp_path / "b", {"m.weight": W, "m.weight_scale_inv": other}, config))
    assert torch.equal(checkpoint.dequantize("m.weight"), blocks(W, other, 64, 64))


@pytest.mark.parametrize(("rows", "parts"), [(576, 5), (129, 2), (1, 1), (7, 1)])
def test_ragged_blocks(rows: int, parts: int, tmp_path: Path) -> None:
    w, grid = fp8(rows, 200), scales(parts, 2)
    checkpoint = open_checkpoint(write(tmp_path, {"m.weight": w, "m.weight_scale_inv": grid}, BLOCKS))
    assert torch.equal(checkpoint.dequantize("m.weight"), blocks(w, grid, 128, 128))


# ---- ComfyUI


def comfy(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    return write(folder, {f"model.diffusion_model.{key}": t for key, t in tensors.items()}, metadata=metadata) / (
        "model.safetensors"
    )


@pytest.mark.parametrize(("marker", "activation"), [(0, TENSOR), (2, None)])
def test_comfy_legacy(marker: int, activation: Granularity | None, tmp_path: Path) -> None:
    parts = {"m.weight": W, "m.scale_weight": ONE.reshape(()), "m.bias": torch.ones(N, dtype=torch.bfloat16)}
    parts["scaled_fp8"] = torch.zeros(marker, dtype=torch.float8_e4m3fn)
    checkpoint = open_checkpoint(comfy(tmp_path, parts))
    assert checkpoint.format.name == "comfy"
    assert set(checkpoint) == {"m.weight", "m.bias"}
    assert torch.equal(checkpoint.dequantize("m.weight"), ANSWERS["tensor"])
    assert checkpoint.layers["m.weight"].scheme.activation == activation


def header(**layer: Any) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"layers": {"model.diffusion_model.m": layer}})}


def test_comfy_metadata_with_fp8_stored_as_bytes(tmp_path: Path) -> None:
    parts = {"m.weight": W.view(torch.uint8), "m.weight_scale": ONE.reshape(()), "m.input_scale": torch.tensor(0.5)}
    checkpoint = open_checkpoint(comfy(tmp_path, parts, header(format="float8_e4m3fn")))
    assert torch.equal(checkpoint.dequantize("m.weight"), ANSWERS["tensor"])
    assert checkpoint.layers["m.weight"].scheme.static


def test_comfy_per_layer_descriptions(tmp_path: Path) -> None:
    text = json.dumps({"format": "float8_e4m3fn_rowwise", "full_precision_matrix_mult": True}).encode()
    parts = {"m.weight": W, "m.weight_scale": ROWS.flatten(), "m.comfy_quant": torch.tensor(list(text)).to(torch.uint8)}
    checkpoint = open_checkpoint(comfy(tmp_path, parts))
    assert set(checkpoint) == {"m.weight"}
    assert torch.equal(checkpoint.dequantize("m.weight"), ANSWERS["row"])
    assert checkpoint.layers["m.weight"].scheme.activation is None


def test_comfy_blocks(tmp_path: Path) -> None:
    parts = {"m.weight": W, "m.weight_scale": scales(3, 5)}
    described = header(format="float8_e4m3fn_blockwise", group_size=64)
    checkpoint = open_checkpoint(comfy(tmp_path, parts, described))
    assert torch.equal(checkpoint.dequantize("m.weight"), blocks(W, scales(3, 5), 64, 64))


def test_comfy_other_formats_are_refused(tmp_path: Path) -> None:
    parts = {"m.weight": W.view(torch.uint8), "m.weight_scale": ONE.reshape(())}
    checkpoint = open_checkpoint(comfy(tmp_path, parts, header(format="nvfp4")))
    with pytest.raises(CheckpointError, match=r"m\.weight cannot be read: .* stored as 'nvfp4'; ComfyUI's FP8 formats"):
        checkpoint["m.weight"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_comfy_raw_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    w = fp8(N, K, dtype=dtype)
    bias = torch.tensor([1.5, -2.0]).to(dtype)
    checkpoint = open_checkpoint(comfy(tmp_path, {"m.weight": w, "m.bias": bias}))
    assert torch.equal(checkpoint.dequantize("m.weight"), w.float())
    assert torch.equal(checkpoint.dequantize("m.bias"), torch.tensor([1.5, -2.0]))
    assert checkpoint.layout.suspicious == ["no scales: read as a raw cast, with every scale 1"]


def test_a_raw_cast_beside_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"m\.weight is FP8 but has no scale"):
        open_checkpoint(write(tmp_path, {"m.weight": W}, model_config={"model_type": "llama"}))


# ---- what is wrong with a file


def test_fp8_without_a_scale_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, {"m.weight": W, "o.weight": W, "o.weight_scale": ROWS}, compressed("channel", "token"))
    with pytest.raises(CheckpointError, match=r"m\.weight is torch\.float8_e4m3fn \[192, 320\] and has no scale"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["ct-channel", "ct-block", "fine-grained", "modelopt", "plain-static"])
def test_a_scale_of_the_wrong_shape_is_named_with_both_shapes(name: str, tmp_path: Path) -> None:
    format, parts, config, metadata, *rest = CASES[name]
    key = next(part for part in parts if part.startswith("weight_scale"))
    wrong: Case = (format, {**parts, key: scales(2, 2)}, config, metadata, *rest)  # type: ignore[assignment]
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(written(tmp_path, wrong))
    assert f"m.{key} has shape [2, 2], which fits no scale of m.weight of shape [192, 320]" in str(error.value)


def test_a_config_that_contradicts_the_shapes_says_what_would_fit(tmp_path: Path) -> None:
    config = {**BLOCKS, "weight_block_size": [64, 64]}
    with pytest.raises(CheckpointError, match=r"has shape \[2, 3\].*64x64 has \[3, 5\]"):
        open_checkpoint(write(tmp_path, {"m.weight": W, "m.weight_scale_inv": GRID}, config))
    with pytest.raises(CheckpointError, match="two positive integers, found 'big'"):
        open_checkpoint(
            write(tmp_path, {"m.weight": W, "m.weight_scale_inv": GRID}, {**BLOCKS, "weight_block_size": "big"})
        )


def test_a_config_that_contradicts_what_tensors_say_is_reported(tmp_path: Path) -> None:
    config = {**compressed("channel", "token"), "ignore": ["re:.*m$"]}
    checkpoint = open_checkpoint(write(tmp_path / "a", {"m.weight": W, "m.weight_scale": ROWS}, config))
    assert torch.equal(checkpoint.dequantize("m.weight"), ANSWERS["row"])
    assert checkpoint.layout.suspicious == ["m is FP8 although the config ignores it"]
    checkpoint = open_checkpoint(write(tmp_path / "b", {"m.weight": W, "m.weight_scale_inv": ROWS}, BLOCKS))
    assert torch.equal(checkpoint.dequantize("m.weight"), ANSWERS["row"])
    assert "the config says blocks" in checkpoint.layout.suspicious[0]


def test_two_scales_for_one_weight(tmp_path: Path) -> None:
    tensors = {"m.weight": W, "m.weight_scale": ROWS, "m.weight_scale_inv": GRID}
    with pytest.raises(CheckpointError, match=r"m\.weight has 2 scales, m\.weight_scale and m\.weight_scale_inv"):
        open_checkpoint(write(tmp_path, tensors, BLOCKS))


def test_a_scale_of_a_dtype_that_is_none(tmp_path: Path) -> None:
    tensors = {"m.weight": W, "m.weight_scale": torch.ones(N, 1, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match=r"m\.weight_scale is torch\.int32; a scale must be one of"):
        open_checkpoint(write(tmp_path, tensors, compressed("channel", "token")))


def test_scales_beside_dense_weights_are_ignored_and_reported(tmp_path: Path) -> None:
    tensors = {
        "m.weight": W,
        "m.weight_scale_inv": GRID,
        "dense.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        "dense.weight_scale_inv": torch.full((1, 1), 6.6e29),
    }
    checkpoint = open_checkpoint(write(tmp_path, tensors, BLOCKS))
    assert set(checkpoint) == {"m.weight", "dense.weight"}
    assert torch.equal(checkpoint.dequantize("dense.weight"), torch.ones(4, 4))
    assert list(checkpoint.unused_keys) == ["dense.weight_scale_inv"]
    assert "dense.weight is not FP8" in checkpoint.unused_keys["dense.weight_scale_inv"]


def test_stray_fused_scales_beside_dense_experts(tmp_path: Path) -> None:
    tensors = {f"mlp.experts.{e}.{p}_proj.weight": torch.ones(8, 8) for e in (0, 1) for p in ("gate", "up", "down")}
    tensors |= {"mlp.experts.gate_up_proj_scale_inv": torch.full((2, 2, 1), torch.nan)}
    tensors |= {"m.weight": W, "m.weight_scale_inv": GRID}
    checkpoint = open_checkpoint(write(tmp_path, tensors, BLOCKS))
    assert list(checkpoint.unused_keys) == ["mlp.experts.gate_up_proj_scale_inv"]
    assert torch.equal(checkpoint.dequantize("mlp.experts.gate_up_proj"), torch.ones(2, 16, 8))


def test_unknown_scales_are_reported(tmp_path: Path) -> None:
    tensors = {"m.weight": W, "m.weight_scale": ROWS, "gone.weight_scale": ROWS, "norm.scale": torch.ones(3)}
    checkpoint = open_checkpoint(write(tmp_path, tensors, compressed("channel", "token")))
    assert checkpoint.unused_keys == {"gone.weight_scale": "looks like a scale, but belongs to no weight"}
    assert torch.equal(checkpoint.dequantize("norm.scale"), torch.ones(3)), "a norm's own parameter is data"


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    broken = ROWS.clone()
    broken[7] = torch.inf
    checkpoint = open_checkpoint(
        write(tmp_path, {"m.weight": W, "m.weight_scale": broken}, compressed("channel", "token"))
    )
    with pytest.raises(CheckpointError, match=r"m\.weight_scale, the scale of m\.weight, holds non-finite"):
        checkpoint["m.weight"]


@pytest.mark.parametrize("point", [1.0, -1.0])
def test_zero_points_that_are_not_zero(point: float, tmp_path: Path) -> None:
    tensors = {"m.weight": W, "m.weight_scale": ROWS, "m.weight_zero_point": torch.full((N, 1), point)}
    checkpoint = open_checkpoint(write(tmp_path, tensors, compressed("channel", "token")))
    with pytest.raises(CheckpointError, match=r"m\.weight_zero_point is not zero"):
        checkpoint["m.weight"]


def test_kv_scales_are_kept_apart(tmp_path: Path) -> None:
    tensors = {
        "a.k_proj.weight": W,
        "a.k_proj.weight_scale": ROWS,
        "a.k_proj.output_scale": torch.tensor([0.25]),
        "b.k_scale": torch.tensor([0.5]),
        "b.v_proj.v_scale": torch.tensor(0.75),
    }
    checkpoint = open_checkpoint(write(tmp_path, tensors, compressed("channel", "token")))
    assert set(checkpoint) == {"a.k_proj.weight"}
    assert {name: float(scale) for name, scale in checkpoint.kv_scales.items()} == {
        "a.k_proj.output_scale": 0.25,
        "b.k_scale": 0.5,
        "b.v_proj.v_scale": 0.75,
    }
    assert checkpoint.unused_keys == {}


def test_scales_that_are_fp8_themselves_are_no_weights(tmp_path: Path) -> None:
    """NVFP4 keeps one scale for 16 elements in float8_e4m3fn."""
    tensors = {"m.weight_packed": torch.zeros(N, K // 2, dtype=torch.uint8), "m.weight_scale": fp8(N, K // 16)}
    tensors |= {"o.weight": W, "o.weight_scale": ROWS}
    checkpoint = open_checkpoint(write(tmp_path, tensors, compressed("channel", "token")))
    assert list(checkpoint.layers) == ["o.weight"]
    with pytest.raises(CheckpointError, match=r"m\.weight cannot be read"):
        checkpoint["m.weight"]


@pytest.mark.parametrize("key", ["m.weight", "m.weight_packed"])
def test_other_quantizations_are_refused_when_read(key: str, tmp_path: Path) -> None:
    tensors = {key: torch.zeros(N, K // 2, dtype=torch.int8), "m.weight_scale": scales(N, 10), "o.weight": W}
    tensors["o.weight_scale"] = ROWS
    checkpoint = open_checkpoint(write(tmp_path, tensors, compressed("channel", "token")))
    with pytest.raises(CheckpointError, match=r"m\.weight cannot be read: .*int8 \[192, 160\] with a scale: not FP8"):
        checkpoint["m.weight"]
    assert "not FP8" in checkpoint.layout.suspicious[0]


# ---- experts

E, INNER, H = 3, 192, 128


def experts(suffix: str, scale: Callable[[int, int], torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {}
    for e in range(E):
        for index, (part, n, k) in enumerate((("gate_proj", INNER, H), ("up_proj", INNER, H), ("down_proj", H, INNER))):
            tensors[f"mlp.experts.{e}.{part}.weight"] = fp8(n, k, seed=10 * e + index)
            if suffix:
                tensors[f"mlp.experts.{e}.{part}.{suffix}"] = scale(n, k) * (1 + e + 3 * index)
    return tensors


LAYOUTS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], Granularity, Granularity]] = {
    "rows": (experts("weight_scale", lambda n, k: scales(n, 1)), compressed("channel", "token"), ROW, ROW),
    "tensors": (experts("weight_scale", lambda n, k: scales(1)), compressed("tensor", "tensor"),
                Granularity(INNER, None), TENSOR),
    # 192 rows end inside a block: rows of 1 x 128 say the same without loss.
    "blocks": (experts("weight_scale_inv", lambda n, k: scales(-(-n // 128), -(-k // 128))), BLOCKS, GROUP_128,
               BLOCK_128),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_appear_stacked(layout: str, tmp_path: Path) -> None:
    tensors, config, gate_up, down = LAYOUTS[layout]
    checkpoint = open_checkpoint(write(tmp_path, tensors, config))
    stacked = {name: checkpoint[f"mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj")}
    assert [value.granularity for value in stacked.values() if isinstance(value, ScaledTensor)] == [gate_up, down]
    assert checkpoint.shape("mlp.experts.gate_up_proj") == (E, 2 * INNER, H) == tuple(stacked["gate_up_proj"].shape)
    dense = {name: checkpoint.dequantize(f"mlp.experts.{name}") for name in stacked}
    for e in range(E):
        parts = {p: checkpoint.dequantize(f"mlp.experts.{e}.{p}_proj.weight") for p in ("gate", "up", "down")}
        assert torch.equal(dense["gate_up_proj"][e], torch.cat([parts["gate"], parts["up"]]))
        assert torch.equal(dense["down_proj"][e], parts["down"])


def test_mixtral_names_stack_too(tmp_path: Path) -> None:
    tensors, config, *_ = LAYOUTS["rows"]
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    renamed = {}
    for key, tensor in tensors.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key.replace("mlp", "block_sparse_moe")] = tensor
    a = open_checkpoint(write(tmp_path / "a", tensors, config))
    b = open_checkpoint(write(tmp_path / "b", renamed, config))
    for part in ("gate_up_proj", "down_proj"):
        assert torch.equal(a.dequantize(f"mlp.experts.{part}"), b.dequantize(f"block_sparse_moe.experts.{part}"))


@pytest.mark.parametrize("inner", [128, 192])
def test_per_expert_weights_with_fused_scales(inner: int, tmp_path: Path) -> None:
    """Layout 3: the scales of gate and up follow each other, each with blocks of its own."""
    tensors, answers = {}, {}
    grids = {"gate": (-(-inner // 128), 1), "up": (-(-inner // 128), 1), "down": (1, -(-inner // 128))}
    fused: dict[str, list[torch.Tensor]] = {"gate": [], "up": [], "down": []}
    for e in range(E):
        for index, (part, grid) in enumerate(grids.items()):
            w = fp8(H, inner) if part == "down" else fp8(inner, H)
            scale = scales(*grid, seed=10 * e + index)
            fused[part].append(scale)
            tensors[f"mlp.experts.{e}.{part}_proj.weight"] = w
            answers[f"mlp.experts.{e}.{part}_proj.weight"] = blocks(w, scale, 128, 128)
    pairs = [torch.cat(pair) for pair in zip(fused["gate"], fused["up"], strict=True)]
    tensors["mlp.experts.gate_up_proj_scale_inv"] = torch.stack(pairs)
    tensors["mlp.experts.down_proj_scale_inv"] = torch.stack(fused["down"])
    checkpoint = open_checkpoint(write(tmp_path, tensors, BLOCKS))
    assert checkpoint.unused_keys == {}
    for name, answer in answers.items():
        assert torch.equal(checkpoint.dequantize(name), answer), name


def test_fused_scales_whose_blocks_cross_from_gate_to_up(tmp_path: Path) -> None:
    """ceil(2 * 192 / 128) = 3 rows of blocks over both: up begins in the middle of the second."""
    both, scale = fp8(2 * INNER, H), scales(3, 1)
    tensors = {
        "mlp.experts.0.gate_proj.weight": both[:INNER],
        "mlp.experts.0.up_proj.weight": both[INNER:],
        "mlp.experts.gate_up_proj_scale_inv": scale[None],
    }
    checkpoint = open_checkpoint(write(tmp_path, tensors, BLOCKS))
    assert torch.equal(checkpoint.dequantize("mlp.experts.0.up_proj.weight"), blocks(both, scale, 128, 128)[INNER:])
    assert torch.equal(checkpoint.dequantize("mlp.experts.0.gate_proj.weight"), blocks(both, scale, 128, 128)[:INNER])


@pytest.mark.parametrize("rows", [3, 4])
def test_stacked_blocks(rows: int, tmp_path: Path) -> None:
    """Layout 4: blocks over gate and up together (3 rows of them), or anew for up (4)."""
    data = torch.stack([fp8(2 * INNER, H, seed=e) for e in range(E)])
    scale = scales(E, rows, 1)
    tensors = {"mlp.experts.gate_up_proj": data, "mlp.experts.gate_up_proj_scale_inv": scale}
    checkpoint = open_checkpoint(write(tmp_path, tensors, BLOCKS))
    for e, values in enumerate(checkpoint.dequantize("mlp.experts.gate_up_proj")):
        if rows == 3:
            answer = blocks(data[e], scale[e], 128, 128)
        else:
            answer = torch.cat(
                [blocks(data[e, :INNER], scale[e, :2], 128, 128), blocks(data[e, INNER:], scale[e, 2:], 128, 128)]
            )
        assert torch.equal(values, answer)


@pytest.mark.parametrize("shape", [(E,), (E, 1, 1), (E, 2), (E, 2 * INNER), (E, 2 * INNER, 1), (1,)])
def test_stacked_scales_of_other_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    data = torch.stack([fp8(2 * INNER, H, seed=e) for e in range(E)])
    scale = scales(*shape)
    tensors = {"mlp.experts.gate_up_proj": data, "mlp.experts.gate_up_proj_scale": scale}
    checkpoint = open_checkpoint(write(tmp_path, tensors, {"quant_method": "fp8", "activation_scheme": "dynamic"}))
    rows = scale.reshape(-1, 1, 1) if scale.numel() in (1, E) else scale.reshape(E, -1).repeat_interleave(
        2 * INNER // (scale.numel() // E), dim=1
    )[..., None]  # fmt: skip
    assert torch.equal(checkpoint.dequantize("mlp.experts.gate_up_proj"), data.float() * rows)


@pytest.mark.parametrize("square", [False, True])
def test_fbgemm_transposed_experts(square: bool, tmp_path: Path) -> None:
    """[E, K, N] with a scale for each column: as (E, 1, N), or as (E, N, 1), also where K = N."""
    inner = H if square else INNER
    up, down = torch.stack([fp8(H, 2 * inner)] * E), torch.stack([fp8(inner, H)] * E)
    up_scale, down_scale = scales(E, 1, 2 * inner), scales(E, H, 1)
    tensors = {
        "f.experts.gate_up_proj": up,
        "f.experts.gate_up_proj_scale": up_scale,
        "f.experts.down_proj": down,
        "f.experts.down_proj_scale": down_scale,
    }
    checkpoint = open_checkpoint(write(tmp_path, tensors, {"quant_method": "fbgemm_fp8"}))
    assert torch.equal(checkpoint.dequantize("f.experts.gate_up_proj"), up.float() * up_scale)
    assert torch.equal(checkpoint.dequantize("f.experts.down_proj"), down.float() * down_scale.reshape(E, 1, H))


# ---- pure functions


@settings(deadline=None)
@given(
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    rows=st.sampled_from([None, 1, 64, 128]),
    cols=st.sampled_from([None, 32, 64, 128]),
)
def test_every_granularity_is_recognised_from_its_own_grid(n: int, k: int, rows: int | None, cols: int | None) -> None:
    granularity = Granularity(rows, cols)
    grid = granularity.scale_shape((n, k))
    assert granularity_of((n, k), grid, [granularity]) == granularity
    found = granularity_of((n, k), grid, ())
    if found is not None:  # without a config only readings that give the same values are found
        a, b = scales(*grid), fp8(n, k)
        same = ScaledTensor(b, a.reshape(found.scale_shape((n, k))), found)
        assert torch.equal(dequantize(same), dequantize(ScaledTensor(b, a, granularity)))


@settings(deadline=None)
@given(
    heights=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    k=st.integers(1, 200),
    granularity=st.sampled_from([TENSOR, ROW, BLOCK_128, GROUP_128, MX, Granularity(64, 32)]),
)
def test_joined_rows_keep_every_value(heights: list[int], k: int, granularity: Granularity) -> None:
    parts = [
        ScaledTensor(fp8(n, k, seed=i), scales(*granularity.scale_shape((n, k)), seed=i), granularity)
        for i, n in enumerate(heights)
    ]
    assert torch.equal(dequantize(join_rows(parts)), torch.cat([dequantize(part) for part in parts]))


def test_formats_have_names_and_one_claims_each() -> None:
    assert len({format.name for format in FORMATS}) == len(FORMATS)
    empty = Contents(tensors={"x": TensorInfo(dtype=torch.bfloat16, shape=(2, 2))})
    format, reason = detect(empty)
    assert (format.name, reason) == ("unquantized", "no tensor is FP8")
    assert scan(empty, format).plain == {"x": "x"}


def test_compressed_activations_are_static_unless_they_say_dynamic(tmp_path: Path) -> None:
    """The library's own default: an input scale is used where the config has no word of it."""
    config = compressed("tensor", "tensor")
    del config["config_groups"]["group_0"]["input_activations"]["dynamic"]
    write(tmp_path, {"m.weight": W, "m.weight_scale": ONE, "m.input_scale": torch.tensor([0.5])}, config)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layers["m.weight"].scheme.static
    assert checkpoint.input_scale("m.weight") == torch.tensor(0.5)


def test_a_group_that_names_a_module_comes_before_one_that_names_its_class(tmp_path: Path) -> None:
    config = compressed("channel", "token")
    own = compressed("channel", None)["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = {**own, "targets": ["re:.*special$"]}
    scale = {"special.weight_scale": ROWS, "usual.weight_scale": ROWS}
    layers = open_checkpoint(write(tmp_path, {"special.weight": W, "usual.weight": W, **scale}, config)).layers
    assert layers["special.weight"].scheme.activation is None
    assert layers["usual.weight"].scheme.activation == ROW


def test_modelopts_weight_only_algorithms_leave_activations(tmp_path: Path) -> None:
    for algorithm, activation in (("FP8", TENSOR), ("FP8_WO", None), ("fp8_wo", None)):
        config = {"quant_method": "modelopt", "quant_algo": algorithm}
        folder = write(tmp_path / algorithm, {"m.weight": W, "m.weight_scale": ONE.reshape(())}, config)
        assert open_checkpoint(folder).layers["m.weight"].scheme.activation == activation


def test_torchaos_single_row_has_a_scale_a_row(tmp_path: Path) -> None:
    """A block of one row is a row also where the weight has no other."""
    tensors = {"m._weight_qdata": W[:1].contiguous(), "m._weight_scale": ROWS[:1]}
    folder = write(tmp_path, tensors, {"quant_method": "torchao"}, metadata={"m.weight": json.dumps(AO)})
    assert open_checkpoint(folder).layers["m.weight"].granularity == ROW
