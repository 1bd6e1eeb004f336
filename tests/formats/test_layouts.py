"""Weights that are stored otherwise than a model multiplies with them: read exactly, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import blocks, compressed, e8m0, fp8, powers, scales, write
from torch import nn

from fp8gemm import MX, ROW, CheckpointError, Granularity, dequantize
from fp8gemm.checkpoint import convert_checkpoint, load_checkpoint, open_checkpoint
from fp8gemm.formats import REFUSED
from fp8gemm.formats.refused import FILES

N, K = 48, 64
W, ROWS = fp8(N, K), scales(N, 1)
DENSE = W.float() * ROWS
SDNQ: dict[str, Any] = {"quant_method": "sdnq", "weights_dtype": "float8_e4m3fn"}
AUTO_ROUND: dict[str, Any] = {"quant_method": "auto-round", "bits": 8, "data_type": "fp", "act_bits": 8}


def turned(data: torch.Tensor) -> torch.Tensor:
    return data.view(torch.uint8).t().contiguous().view(data.dtype)


def linear(weight: torch.Tensor) -> nn.Module:
    return nn.ModuleDict({"m": nn.Linear(weight.shape[1], weight.shape[0], bias=False)})


# ---- what is read

CASES: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any] | None, torch.Tensor, Granularity]] = {
    "sdnq rows": ({"m.weight": W, "m.scale": ROWS}, SDNQ, DENSE, ROW),
    "sdnq groups": (
        {"m.weight": W.view(N, 4, 16), "m.scale": scales(N, 4).view(N, 4, 1)},
        SDNQ,
        blocks(W, scales(N, 4), 1, 16),
        Granularity(1, 16),
    ),
    "sdnq matmul": (
        {"m.weight": turned(W), "m.scale": ROWS.t()},
        {**SDNQ, "use_quantized_matmul": True},
        DENSE,
        ROW,
    ),
    "quanto": ({"m.weight._data": W, "m.weight._scale": ROWS.bfloat16(), "m.input_scale": torch.ones(()),
                "m.output_scale": torch.ones(())}, None, W.float() * ROWS.bfloat16().float(), ROW),
    "auto-round rows": ({"m.weight": W, "m.weight_scale": ROWS.reshape(N)}, AUTO_ROUND, DENSE, ROW),
    "auto-round groups": (
        {"m.weight": W, "m.weight_scale": scales(N, 3).reshape(-1)},
        {**AUTO_ROUND, "group_size": 24},
        blocks(W, scales(N, 3), 1, 24),
        Granularity(1, 24),
    ),
    "auto-round groups of one layer": (
        {"m.weight": W, "m.weight_scale": scales(N, 2).reshape(-1)},
        {**AUTO_ROUND, "group_size": -1, "extra_config": {"m": {"group_size": 32}}},
        blocks(W, scales(N, 2), 1, 32),
        Granularity(1, 32),
    ),
    "auto-round blocks": (
        {"m.weight": W, "m.weight_scale_inv": scales(2, 2)},
        {**AUTO_ROUND, "group_size": [32, 32]},
        blocks(W, scales(2, 2), 32, 32),
        Granularity(32, 32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_read_exactly(name: str, tmp_path: Path) -> None:
    tensors, config, expected, granularity = CASES[name]
    folder = write(tmp_path / "in", tensors, config)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format.name == name.split()[0]
    assert checkpoint.shape("m.weight") == (N, K)
    assert torch.equal(checkpoint.dequantize("m.weight"), expected)
    assert checkpoint.layers["m.weight"].granularity == granularity
    assert not checkpoint.layout.unsupported
    assert not checkpoint.layout.companions
    model = linear(expected)
    load_checkpoint(model, folder)
    assert torch.equal(dequantize(model["m"].weight.scaled(), torch.float32), expected)  # type: ignore[index, union-attr]
    if K % (granularity.cols or 1) == 0:
        convert_checkpoint(checkpoint, tmp_path / "out")
        assert torch.equal(open_checkpoint(tmp_path / "out").dequantize("m.weight"), expected)


def mx_tensor(**more: Any) -> dict[str, str]:
    """torchao's description of an MXFP8 weight."""
    data = {"elem_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"}, "block_size": 32, **more}
    return {"m.weight": json.dumps({"_type": "MXTensor", "_data": data})}


@pytest.mark.parametrize("order", ["rows", "tiles"])
def test_torchaos_mxfp8(order: str, tmp_path: Path) -> None:
    w, scale = fp8(160, 192), powers(160, 6)
    stored = e8m0(scale)
    if order == "tiles":  # byte (r % 32) * 16 + (r % 128 // 32) * 4 + g % 4 of tile (r // 128, g // 4)
        flat = torch.zeros(2 * 2 * 512, dtype=torch.uint8)
        for r in range(160):
            for g in range(6):
                flat[(r // 128 * 2 + g // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + g % 4] = stored[r, g]
        stored = flat.view(64, 32)
    tensors = {"m._weight_qdata": w, "m._weight_scale": stored.view(torch.float8_e8m0fnu)}
    activation = {"_type": "QuantizeTensorToMXKwargs", "_data": {"block_size": 32}}
    metadata = mx_tensor(is_swizzled_scales=order == "tiles", act_quant_kwargs=activation)
    checkpoint = open_checkpoint(write(tmp_path, tensors, metadata=metadata))
    assert torch.equal(checkpoint.dequantize("m.weight"), blocks(w, scale, 1, 32))
    assert checkpoint.layers["m.weight"].scheme.activation == MX


def test_torchaos_other_tensors_are_refused_one_by_one(tmp_path: Path) -> None:
    tensors = {"m._weight_qdata": torch.ones(N, K // 2, dtype=torch.uint8), "m._weight_scale": scales(N, 2)}
    tensors |= {"o._weight_qdata": W, "o._weight_scale": ROWS}
    for metadata, what in (
        (mx_tensor(elem_dtype="float4"), "MXTensor of float4"),
        ({"m.weight": json.dumps({"_type": "Int4Tensor", "_data": {}})}, "Int4Tensor"),
    ):
        checkpoint = open_checkpoint(write(tmp_path / what, tensors, metadata=metadata))
        assert torch.equal(checkpoint.dequantize("o.weight"), DENSE)
        with pytest.raises(CheckpointError, match=f"m.weight is a torchao {what}; only Float8Tensor"):
            checkpoint["m.weight"]


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((8, 6, 3, 3), (8, 1, 3, 3)),  # as SDNQ scales convolutions
        ((8, 6, 3, 3), (8, 1, 1, 1)),
        ((6, 8, 3, 3), (1, 8, 3, 3)),
        ((8, 6, 5), (8, 1, 5)),
        ((8, 6, 2, 3, 3), (8, 1, 1, 1, 1)),
    ],
)
def test_scales_of_convolutions_are_broadcast(shape: tuple[int, ...], grid: tuple[int, ...], tmp_path: Path) -> None:
    w, scale = fp8(shape[0], torch.Size(shape[1:]).numel()).view(shape), scales(*grid)
    checkpoint = open_checkpoint(write(tmp_path, {"m.weight": w, "m.scale": scale}, SDNQ))
    assert torch.equal(checkpoint.dequantize("m.weight"), w.float() * scale)


def test_groups_of_a_convolutions_channels(tmp_path: Path) -> None:
    w, scale = fp8(8, 4 * 3 * 9).view(8, 4, 3, 3, 3), scales(8, 4, 1, 3, 3)
    checkpoint = open_checkpoint(write(tmp_path, {"m.weight": w, "m.scale": scale}, SDNQ))
    assert torch.equal(checkpoint.dequantize("m.weight"), (w.float() * scale).view(8, 12, 3, 3))


def test_sdnq_multiplies_in_fp8_what_it_stores_for_that(tmp_path: Path) -> None:
    tensors = {"a.weight": turned(W), "a.scale": ROWS.t(), "b.weight": W, "b.scale": ROWS}
    config = {**SDNQ, "use_quantized_matmul": True}
    layers = open_checkpoint(write(tmp_path / "fp8", tensors, config)).layers
    assert (layers["a.weight"].scheme.activation, layers["b.weight"].scheme.activation) == (ROW, None)
    layers = open_checkpoint(write(tmp_path / "fp16", tensors, {**config, "quantized_matmul_dtype": "float16"})).layers
    assert layers["a.weight"].scheme.activation is None


@pytest.mark.parametrize(("config", "activation"), [({"act_bits": 16}, None), ({"act_group_size": -1}, ROW),
                                                    ({"act_group_size": 32}, Granularity(1, 32))])  # fmt: skip
def test_auto_round_says_how_to_quantize_activations(config: dict[str, Any], activation: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, {"m.weight": W, "m.weight_scale": ROWS}, {**AUTO_ROUND, **config})
    assert open_checkpoint(folder).layers["m.weight"].scheme.activation == activation


# ---- what is refused: rotations

HADAMARD = {"type": "hadamard", "randomize": False}


def transforms(*locations: str, targets: list[str] | str = "re:.*down_proj$", ignore: list[str] | None = None) -> Any:
    apply = [{"targets": targets, "location": place, "ignore": ignore or []} for place in locations]
    config = compressed("channel", "token")
    return {**config, "transform_config": {"config_groups": {"R4": {**HADAMARD, "apply": apply}}}}


def rotated(folder: Path, config: dict[str, Any], scale: str = "weight_scale") -> Path:
    tensors = {
        "up_proj.weight": W,
        f"up_proj.{scale}": ROWS,
        "down_proj.weight": W,
        f"down_proj.{scale}": ROWS,
        "o_proj.weight": torch.ones(8, 8, dtype=torch.bfloat16),
    }
    return write(folder, tensors, config)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (transforms("input", "weight_input"), {"down_proj.weight"}),
        (transforms("output", "weight_output"), {"down_proj.weight"}),
        (transforms("input", targets=["down_proj", "up_proj"]), {"down_proj.weight", "up_proj.weight"}),
        (transforms("input", targets="o_proj"), {"o_proj.weight"}),
        (transforms("input", targets=["Linear"], ignore=["o_proj"]), {"down_proj.weight", "up_proj.weight"}),
        (transforms("somewhere"), {"down_proj.weight"}),
        (transforms("k_cache"), {"down_proj.weight", "up_proj.weight", "o_proj.weight"}),
        (transforms("weight_input", "weight_output"), set()),  # in the stored values
        (transforms("q_attn", "k_cache"), set()),  # leave the products of queries and keys as they are
    ],
)
def test_online_transforms_are_refused(config: dict[str, Any], names: set[str], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(rotated(tmp_path, config))
    assert set(checkpoint.layout.unsupported) == names
    for name in names:
        with pytest.raises(CheckpointError, match=f"{name} cannot be read: transform_config R4 rotates its .*hadamard"):
            checkpoint.dequantize(name)


@pytest.mark.parametrize(
    ("config", "scale", "says"),
    [
        (transforms("input"), "weight_scale", "transform_config R4"),
        ({**SDNQ, "use_hadamard": True}, "scale", "use_hadamard"),
        ({**SDNQ, "modules_quant_config": {"down_proj": {"use_hadamard": True}}}, "scale", "use_hadamard"),
        ({**AUTO_ROUND, "rotation_config": {"hadamard_type": "hadamard"}}, "weight_scale", "rotation_config"),
        ({**AUTO_ROUND, "spinquant_config": {"r1": True}}, "weight_scale", "spinquant_config"),
        ({**compressed("channel", "token"), "rotation_config": {"block_size": 32}}, "weight_scale", "rotation_config"),
        ({"quant_method": "fp8", "online_rotation": "hadamard"}, "weight_scale", "online_rotation"),
        ({"quant_method": "quark", "algo_config": [{"name": "quarot"}]}, "weight_scale", r"algo_config\[0\]"),
        (
            {"quant_method": "quark", "algo_config": [{"name": "rotation", "online_r1_rotation": True}]},
            "weight_scale",
            r"algo_config\[0\]",
        ),
    ],
)
def test_nothing_passes_over_a_rotation(config: dict[str, Any], scale: str, says: str, tmp_path: Path) -> None:
    folder = rotated(tmp_path / "in", config, scale)
    model = nn.ModuleDict({name: nn.Linear(K, N, bias=False) for name in ("up_proj", "down_proj")})
    before = model["down_proj"].weight.clone()
    for how in ({}, {"dequantize": True}, {"strict": False}):
        with pytest.raises(CheckpointError, match=rf"down_proj\.weight: .*{says}"):
            load_checkpoint(model, folder, **how)  # type: ignore[arg-type]
    assert torch.equal(model["down_proj"].weight, before)
    with pytest.raises(CheckpointError, match=says):
        convert_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config",
    [
        {**SDNQ, "use_hadamard": False, "hadamard_group_size": 256},
        {**AUTO_ROUND, "rotation_config": {}},
        {**AUTO_ROUND, "rotation_config": None, "hadamard_config": "none"},
        {"quant_method": "quark", "algo_config": [{"name": "rotation"}, {"name": "smoothquant"}]},
        {"quant_method": "quark", "algo_config": [{"name": "quarot", "r4": False}]},
        {**compressed("channel", "token"), "transform_config": {}},
    ],
    ids=str,
)
def test_rotations_that_are_turned_off_or_in_the_weights_are_none(config: dict[str, Any], tmp_path: Path) -> None:
    scale = "scale" if config["quant_method"] == "sdnq" else "weight_scale"
    checkpoint = open_checkpoint(rotated(tmp_path, config, scale))
    assert torch.equal(checkpoint.dequantize("down_proj.weight"), DENSE)


def test_one_scale_does_not_tell_which_way_round_a_matrix_is(tmp_path: Path) -> None:
    config = {**SDNQ, "use_quantized_matmul": True}
    with pytest.raises(CheckpointError, match=r"m\.weight has one scale .*use_quantized_matmul=False"):
        open_checkpoint(write(tmp_path / "a", {"m.weight": W, "m.scale": scales(1, 1)}, config))
    narrow = fp8(8, K)  # too narrow for SDNQ's product
    checkpoint = open_checkpoint(write(tmp_path / "b", {"m.weight": narrow, "m.scale": scales(1, 1)}, config))
    assert torch.equal(checkpoint.dequantize("m.weight"), narrow.float() * scales(1, 1))


# ---- what is refused: tensors beside a weight

COMPANIONS = {
    "svd_up": torch.ones(N, 4),
    "svd_down": torch.ones(4, K),
    "lora_A.weight": torch.ones(4, K),
    "input_quantizer._pre_quant_scale": torch.ones(K),
    "pre_quant_scale": torch.ones(K),
    "smooth_factor": torch.ones(K),
    "weight_zp": torch.ones(N, 1),
    "zero_point": torch.ones(N, 1),
    "weight_g_idx": torch.arange(K),
    "perm": torch.arange(K),
    "input_rotation": torch.eye(K),
    "hadamard_matrix": torch.eye(K),
    "scale_2": torch.ones(()),
    "weight_scale_2": torch.ones(()),
    "weight_global_scale": torch.ones(1),
    "outlier_values": torch.ones(8),
    "weight_mask": torch.ones(N, K),
}


@pytest.mark.parametrize("name", COMPANIONS)
def test_companions_that_change_a_weight_are_refused(name: str, tmp_path: Path) -> None:
    tensors = {"m.weight": W, "m.weight_scale": ROWS, f"m.{name}": COMPANIONS[name]}
    folder = write(tmp_path / "in", tensors, compressed("channel", "token"))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=rf"m\.weight cannot be read: m\.{name} beside it is "):
        checkpoint["m.weight"]
    for how in ({}, {"dequantize": True}, {"strict": False}):
        with pytest.raises(CheckpointError, match=rf"m\.{name} beside it"):
            load_checkpoint(linear(W), folder, **how)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=rf"m\.{name} beside it"):
        convert_checkpoint(folder, tmp_path / "out")


def test_a_stack_of_experts_has_companions_too(tmp_path: Path) -> None:
    config = compressed("channel", "token")
    tensors = {"experts.up": fp8(4, 96).view(2, 4, 48), "experts.up_weight_scale": scales(2, 4, 1)}
    checkpoint = open_checkpoint(write(tmp_path / "a", {**tensors, "experts.up_bias": torch.ones(2, 4)}, config))
    assert list(checkpoint.layers) == ["experts.up"]
    checkpoint = open_checkpoint(write(tmp_path / "b", {**tensors, "experts.up_zero_point": torch.ones(2, 4)}, config))
    with pytest.raises(CheckpointError, match=r"experts\.up_zero_point beside it is an offset"):
        checkpoint["experts.up"]


class Gain(nn.Linear):
    def __init__(self) -> None:
        super().__init__(K, N, bias=False)
        self.gain = nn.Parameter(torch.zeros(N))


def test_a_tensor_of_unknown_meaning_is_the_models_own_or_refused(tmp_path: Path) -> None:
    tensors = {"m.weight": W, "m.weight_scale": ROWS, "m.gain": torch.ones(N)}
    folder = write(tmp_path / "in", tensors, compressed("channel", "token"))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.layout.suspicious == ["m.gain beside the FP8 weight m.weight: what they mean is not known"]
    with pytest.raises(CheckpointError, match=r"m\.weight: what m\.gain beside it mean"):
        load_checkpoint(linear(W), folder, strict=False)
    with pytest.raises(CheckpointError, match=r"m\.weight: what m\.gain beside it mean"):
        convert_checkpoint(folder, tmp_path / "out")
    own = nn.ModuleDict({"m": Gain()})
    load_checkpoint(own, folder)
    assert torch.equal(own["m"].gain, torch.ones(N))
    assert torch.equal(dequantize(own["m"].weight.scaled(), torch.float32), DENSE)


def test_what_leaves_a_weight_as_it_is_may_stand_beside_it(tmp_path: Path) -> None:
    harmless = {"bias": torch.ones(N), "_extra_state": torch.zeros(4), "e_score_correction_bias": torch.ones(N)}
    harmless |= {"input_scale": torch.ones(1), "output_scale": torch.ones(1), "input_scale_ub": torch.ones(1)}
    tensors = {"k_proj.weight": W, "k_proj.weight_scale": ROWS, "k_proj.k_scale": torch.ones(1)}
    tensors |= {f"k_proj.{name}": tensor for name, tensor in harmless.items()}
    checkpoint = open_checkpoint(write(tmp_path, tensors, compressed("channel", "token")))
    assert list(checkpoint.layers) == ["k_proj.weight"]
    assert not checkpoint.layout.companions


# ---- what is refused as a whole

LAYOUTS: dict[str, tuple[str, dict[str, torch.Tensor], dict[str, Any]]] = {
    "vLLM sharded_state": ("model-rank-0-part-0.safetensors", {"m.weight": W, "m.weight_scale": ROWS[0]}, {}),
    "TensorRT-LLM": ("rank0.safetensors", {"m.weight": W, "m.weights_scaling_factor": ROWS[0]}, {}),
    "2:4 sparse": ("model.safetensors", {"m.compressed": W, "m.bitmask": torch.ones(N, 8, dtype=torch.uint8),
                                         "m.weight_scale": ROWS}, compressed("channel", "token")),
    "MLX": ("model.safetensors", {"m.weight": torch.ones(N, 8, dtype=torch.uint32), "m.scales": scales(N, 2),
                                  "m.biases": scales(N, 2)}, {}),
    "bitsandbytes": ("model.safetensors", {"m.weight": W.view(torch.int8), "m.SCB": ROWS}, {}),
    "GPTQ and AWQ": ("model.safetensors", {"m.qweight": torch.ones(8, N, dtype=torch.int32),
                                           "m.qzeros": torch.ones(1, 6, dtype=torch.int32)}, {"quant_method": "gptq"}),
    "MXFP4": ("model.safetensors", {"e.gate_up_proj_blocks": torch.ones(2, 4, 2, 16, dtype=torch.uint8),
                                    "e.gate_up_proj_scales": torch.ones(2, 4, 2, dtype=torch.uint8)}, {}),
    "HQQ": ("model.safetensors", {"m.W_q": torch.ones(N, 8, dtype=torch.uint8)}, {}),
    "ExLlama": ("model.safetensors", {"m.q_weight": torch.ones(8, N, dtype=torch.int32)}, {}),
    "Nunchaku": ("model.safetensors", {"m.qweight": torch.ones(N, 8, dtype=torch.int8), "m.wscales": ROWS}, {}),
    "vector codes and other integers": ("model.safetensors", {"m.weight": W.view(torch.uint8)},
                                        {"quant_method": "bitnet"}),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_refused_by_its_name(row: Any, tmp_path: Path) -> None:
    name, tensors, config = LAYOUTS[row.name]
    folder = write(tmp_path, tensors, config or None)
    (folder / "model.safetensors").rename(folder / name)
    for source in (folder,) if row.alone else (folder, folder / name):
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(source)
        assert f"this is {row.name}" in str(error.value)
        assert row.why in str(error.value)
        assert row.instead in str(error.value)


def test_one_file_of_tensorrt_llm_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, {"m.weight": W, "m.weights_scaling_factor": ROWS[0]})
    file = (folder / "model.safetensors").rename(folder / "rank0.safetensors")
    assert torch.equal(open_checkpoint(file).dequantize("m.weight"), W.float() * ROWS[0])


def test_several_ranks_are_no_several_checkpoints(tmp_path: Path) -> None:
    for rank in (0, 1):
        folder = write(tmp_path, {"m.weight": W, "m.weight_scale": ROWS[0]}, compressed("tensor", None))
        (folder / "model.safetensors").rename(folder / f"model-rank-{rank}-part-0.safetensors")
    with pytest.raises(CheckpointError, match="this is vLLM sharded_state"):
        open_checkpoint(folder)


@pytest.mark.parametrize("end", FILES)
def test_other_files_are_named(end: str, tmp_path: Path) -> None:
    (tmp_path / f"weights{end}").write_bytes(b"GGUF")
    for source in (tmp_path, tmp_path / f"weights{end}"):
        with pytest.raises(CheckpointError, match=f"weights{end}: only safetensors files are read, and these are "):
            open_checkpoint(source)
    write(tmp_path, {"m.weight": torch.ones(2, 2)})
    assert list(open_checkpoint(tmp_path)) == ["m.weight"]


def test_the_documentation_lists_what_is_refused() -> None:
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    assert [row.name for row in REFUSED if f"| {row.name} |" not in text] == []
    assert [end for end in FILES if f"`{end}`" not in text] == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_amds_types_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"m\.weight has dtype F8_E.M.FNUZ \(the FNUZ type of AMD's MI300"):
        open_checkpoint(write(tmp_path, {"m.weight": torch.ones(4, 4).to(dtype)}))


def test_other_codes_are_named(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.ones(N, K // 2, dtype=torch.int8),
        "a.scale": e8m0(powers(N, K // 32)).view(torch.float8_e8m0fnu),
        "b.weight": torch.ones(N, K // 2, dtype=torch.uint8),
        "b.weight_scale": fp8(N, K // 16),
        "c.weight": torch.ones(N, K, dtype=torch.int8),
        "o.weight": W,
        "o.weight_scale": ROWS,
    }
    checkpoint = open_checkpoint(write(tmp_path, tensors, compressed("channel", "token")))
    reasons = checkpoint.layout.unsupported
    assert "not FP8 but MXFP4" in reasons["a.weight"]
    assert "not FP8 but NVFP4" in reasons["b.weight"]
    assert "without a known scale: not FP8 but INT8" in reasons["c.weight"]
    with pytest.raises(CheckpointError, match=r"c\.weight: .*not FP8 but INT8"):
        load_checkpoint(nn.ModuleDict({"c": nn.Linear(K, N)}), tmp_path, strict=False)


@pytest.mark.parametrize("where", ["ignore", "targets"])
def test_a_pattern_that_is_no_regular_expression_is_named(where: str, tmp_path: Path) -> None:
    config = compressed("channel", "token")
    (config if where == "ignore" else config["config_groups"]["group_0"])[where] = ["re:.*(proj"]
    with pytest.raises(CheckpointError, match=r"\.\*\(proj', which is no regular expression"):
        open_checkpoint(write(tmp_path, {"m.weight": W, "m.weight_scale": ROWS}, config))


def test_a_method_without_fp8_is_reported(tmp_path: Path) -> None:
    folder = write(tmp_path, {"m.weight": torch.ones(4, 4)}, {"quant_method": "new"})
    assert open_checkpoint(folder).layout.suspicious == ["the config says quant_method new, but no tensor is FP8"]
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == {"quant_method": "new"}
