"""ComfyUI's single files: every format that a description may name is read as it is meant, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import blocks, e8m0, fp8, powers, scales, write
from safetensors.torch import load_file
from torch import nn

from fp8gemm import (
    MX,
    ROW,
    TENSOR,
    CheckpointError,
    FP8GemmOptions,
    Granularity,
    Scheme,
    UnsupportedError,
    convert_checkpoint,
    enable_fp8_gemm,
    load_checkpoint,
    quantize_checkpoint,
    save_checkpoint,
)
from fp8gemm.checkpoint import open_checkpoint
from fp8gemm.formats.tiles import tiled, tiled_shape, untiled


def mark(**described: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)


def single(folder: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    return write(folder, tensors, metadata=metadata or None) / "model.safetensors"


def in_tiles(scale: torch.Tensor) -> torch.Tensor:
    """The definition, one scale at a time: offset (r % 32) * 16 + (r // 32) * 4 + c in each tile of 128 x 4."""
    rows, groups = scale.shape
    height, width = -(-rows // 128), -(-groups // 4)
    flat = torch.zeros(height * width * 512, dtype=scale.dtype)
    for r in range(rows):
        for g in range(groups):
            within = (r % 32) * 16 + (r % 128 // 32) * 4 + g % 4
            flat[(r // 128 * width + g // 4) * 512 + within] = scale[r, g]
    return flat.reshape(height * 128, width * 4)


@pytest.mark.parametrize("shape", [(128, 4), (128, 8), (384, 12), (32, 1), (160, 3), (300, 5)])
def test_tiles_are_those_of_the_definition(shape: tuple[int, int]) -> None:
    scale = torch.randint(1, 255, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tiled(scale), in_tiles(scale))
    assert tuple(tiled(scale).shape) == tiled_shape(*shape)
    assert torch.equal(untiled(tiled(scale), rows=shape[0], groups=shape[1]), scale)
    assert torch.equal(untiled(tiled(scale).flatten(), rows=shape[0], groups=shape[1]), scale)


@pytest.mark.parametrize("kind", ["mxfp8", "hybrid_mxfp8"])
@pytest.mark.parametrize("view", [torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize(("n", "k"), [(128, 256), (160, 96), (256, 384)])
def test_mxfp8_scales_are_read_from_their_tiles(kind: str, view: torch.dtype, n: int, k: int, tmp_path: Path) -> None:
    w, scale = fp8(n, k), powers(n, k // 32)
    tensors = {"m.weight": w, "m.weight_scale": in_tiles(e8m0(scale)).view(view), "m.comfy_quant": mark(format=kind)}
    if kind == "hybrid_mxfp8":
        tensors["m.weight_scalar"] = torch.tensor(0.01)
    checkpoint = open_checkpoint(single(tmp_path, tensors))
    assert torch.equal(checkpoint.dequantize("m.weight"), blocks(w, scale, 1, 32))
    assert checkpoint.layers["m.weight"].scheme == Scheme(weight=MX, activation=MX, scale_format="ue8m0")
    assert list(checkpoint.unused_keys) == (["m.weight_scalar"] if kind == "hybrid_mxfp8" else [])
    model = nn.ModuleDict({"m": nn.Linear(k, n, bias=False)})
    load_checkpoint(model, checkpoint)
    assert torch.equal(model["m"].weight.dequantize(), blocks(w, scale, 1, 32))  # type: ignore[operator, union-attr]


def test_mxfp8_scales_without_tiles_are_refused(tmp_path: Path) -> None:
    tensors = {"m.weight": fp8(64, 96), "m.weight_scale": e8m0(powers(64, 3)), "m.comfy_quant": mark(format="mxfp8")}
    with pytest.raises(CheckpointError, match=r"tiles of 128 x 4: \[128, 4\] .* found \[64, 3\]"):
        open_checkpoint(single(tmp_path, tensors))


def test_scales_that_could_have_either_order_are_refused(tmp_path: Path) -> None:
    tensors = {"m.weight": fp8(128, 128), "m.weight_scale": e8m0(powers(128, 4))}
    with pytest.raises(CheckpointError, match="both row by row and in tiles of 128 x 4"):
        open_checkpoint(single(tmp_path, tensors))
    short = {"m.weight": fp8(128, 96), "m.weight_scale": e8m0(powers(128, 3))}  # no whole tile: row by row
    checkpoint = open_checkpoint(single(tmp_path / "short", short))
    assert torch.equal(checkpoint.dequantize("m.weight"), blocks(fp8(128, 96), powers(128, 3), 1, 32))


KINDS: dict[str, tuple[dict[str, Any], torch.Tensor, int, int]] = {
    "rowwise": ({"format": "float8_e4m3fn_rowwise"}, scales(128), 1, 256),
    "block": ({"format": "float8_e4m3fn_blockwise", "group_size": 64}, scales(2, 4), 64, 64),
    "block of no size": ({"format": "float8_e4m3fn_blockwise"}, scales(4, 8), 32, 32),
    "in params": ({"format": "float8_e4m3fn_blockwise", "params": {"group_size": 64}}, scales(2, 4), 64, 64),
    "block3d": ({"format": "float8_e4m3fn_block3d", "group_size": 64}, scales(128, 4, 1), 1, 64),
    "block3d of no size": ({"format": "float8_e4m3fn_block3d"}, scales(128, 2, 1), 1, 128),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("header", [False, True])
def test_descriptions(name: str, header: bool, tmp_path: Path) -> None:
    described, scale, rows, cols = KINDS[name]
    w = fp8(128, 256)
    tensors = {"m.weight": w, "m.weight_scale": scale}
    metadata = {"_quantization_metadata": json.dumps({"layers": {"m": described}})} if header else {}
    if not header:
        tensors["m.comfy_quant"] = mark(**described)
    checkpoint = open_checkpoint(single(tmp_path, tensors, **metadata))
    grid = scale.reshape(scale.shape[0], -1)
    assert torch.equal(checkpoint.dequantize("m.weight"), blocks(w, grid, rows, cols))


def test_blocks_that_divide_unevenly_need_their_size(tmp_path: Path) -> None:
    """192 rows in two blocks may be blocks of 96, or of 128 and a rest."""
    tensors = {"m.weight": fp8(192, 192), "m.weight_scale": scales(2, 2)}
    tensors["m.comfy_quant"] = mark(format="float8_e4m3fn_blockwise")
    with pytest.raises(CheckpointError, match="fits no scale"):
        open_checkpoint(single(tmp_path, tensors))


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"format": "float8_e4m3fn_mystery"}, "stored as 'float8_e4m3fn_mystery'"),
        ({"format": "convrot_w4a4"}, "stored as 'convrot_w4a4'"),
        ({"format": ["float8_e4m3fn"]}, r"stored as \['float8_e4m3fn'\]"),
        ({"format": "float8_e4m3fn", "convrot": True}, "described with convrot"),
        ({"format": "float8_e4m3fn", "params": {"hadamard": 64}}, "described with hadamard"),
    ],
)
def test_descriptions_that_are_not_known_are_refused(described: dict[str, Any], said: str, tmp_path: Path) -> None:
    tensors = {"m.weight": fp8(64, 64), "m.weight_scale": scales(1).reshape(()), "m.comfy_quant": mark(**described)}
    path = single(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=rf"m\.weight cannot be read: m\.weight \[64, 64\] .*{said}"):
        open_checkpoint(path)["m.weight"]
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(nn.ModuleDict({"m": nn.Linear(64, 64, bias=False)}), path, strict=strict)
    with pytest.raises(CheckpointError, match=said):
        convert_checkpoint(path, tmp_path / "out")


def test_a_described_layer_needs_its_scale(tmp_path: Path) -> None:
    tensors = {"m.weight": fp8(64, 64), "m.comfy_quant": mark(format="float8_e4m3fn")}
    with pytest.raises(CheckpointError, match=r"stored as 'float8_e4m3fn', but has no scale"):
        open_checkpoint(single(tmp_path, tensors))["m.weight"]


def mixed() -> dict[str, torch.Tensor]:
    tensors = {
        "a.weight": fp8(64, 64),
        "a.weight_scale": scales(1).reshape(()),
        "a.comfy_quant": mark(format="float8_e4m3fn"),
    }
    tensors |= {"b.weight": torch.ones(64, 32, dtype=torch.uint8), "b.weight_scale": fp8(128, 4)}
    tensors |= {"b.weight_scale_2": torch.tensor(0.5), "b.comfy_quant": mark(format="nvfp4")}
    tensors |= {"c.weight": torch.ones(64, 64, dtype=torch.int8), "c.weight_scale": scales(64, 1)}
    return {**tensors, "c.comfy_quant": mark(format="int8_tensorwise", convrot=True), "c.bias": torch.ones(64)}


def test_the_fp8_part_of_a_mixed_file_is_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(single(tmp_path, mixed()))
    assert list(checkpoint.layers) == ["a.weight"]
    assert torch.equal(checkpoint.dequantize("a.weight"), fp8(64, 64).float() * scales(1))
    assert torch.equal(checkpoint.dequantize("c.bias"), torch.ones(64))
    assert set(checkpoint.layout.unsupported) == {"b.weight", "c.weight"}
    assert set(checkpoint.unused_keys) == {"b.weight_scale", "b.weight_scale_2", "c.weight_scale"}
    model = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False)})
    with pytest.raises(CheckpointError, match=r"c\.weight .*'int8_tensorwise'[\s\S]*b\.weight .*'nvfp4'"):
        load_checkpoint(model, checkpoint)
    load_checkpoint(model, checkpoint, strict=False)
    whole = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)})
    with pytest.raises(CheckpointError, match="'nvfp4'"):
        load_checkpoint(whole, checkpoint, strict=False)


def test_markers_and_tokenizers_are_no_models(tmp_path: Path) -> None:
    tensors = {
        "m.weight": fp8(64, 64),
        "m.scale_weight": scales(1).reshape(()),
        "spiece_model": torch.ones(9, dtype=torch.uint8),
    }
    tensors |= {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn), "__index_timestep_zero__": torch.zeros(0)}
    path = single(tmp_path, tensors)
    report = load_checkpoint(nn.ModuleDict({"m": nn.Linear(64, 64, bias=False)}), path)
    assert report.unexpected == ()
    tensors = {key: tensor for key, tensor in tensors.items() if "scale" not in key}
    raw = single(tmp_path / "raw", tensors)
    assert load_checkpoint(nn.ModuleDict({"m": nn.Linear(64, 64, bias=False)}), raw).unexpected == ()
    convert_checkpoint(path, tmp_path / "out.safetensors", format="comfy")
    assert {"spiece_model", "__index_timestep_zero__"} <= set(load_file(tmp_path / "out.safetensors"))


# ---- raw weights beside scaled ones


def partly_scaled(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for index in range(2):
        tensors[f"blocks.{index}.fc.weight"] = fp8(64, 64, seed=index)
        tensors[f"blocks.{index}.fc.scale_weight"] = scales(1).reshape(())
    return {**tensors, **more}


def test_raw_weights_beside_scaled_ones_are_read(tmp_path: Path) -> None:
    w, bias = fp8(64, 64, seed=5), torch.ones(64).to(torch.float8_e4m3fn)
    path = single(tmp_path, partly_scaled(**{"img_in.weight": w, "img_in.bias": bias}))
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint.dequantize("img_in.weight"), w.float())
    assert torch.equal(checkpoint.dequantize("img_in.bias"), torch.ones(64))
    assert checkpoint.layout.suspicious == [
        "1 FP8 weights have no scale and were read with a scale of 1: img_in.weight"
    ]


def test_a_scale_that_is_missing_beside_scaled_weights_is_noticed(tmp_path: Path) -> None:
    same = partly_scaled(**{"blocks.2.fc.weight": fp8(64, 64)})
    with pytest.raises(CheckpointError, match=r"blocks\.2\.fc\.weight .* no scale.*of the same name elsewhere"):
        open_checkpoint(single(tmp_path / "a", same))
    largest = fp8(64, 64)
    largest[0, 0] = -448
    with pytest.raises(CheckpointError, match=r"img_in\.weight .* no scale.*largest of the dtype"):
        open_checkpoint(single(tmp_path / "b", partly_scaled(**{"img_in.weight": largest})))
    told = open_checkpoint(single(tmp_path / "b", partly_scaled(**{"img_in.weight": largest})), raw=True)
    assert torch.equal(told.dequantize("img_in.weight"), largest.float())


# ---- writing

SCHEMES: dict[str, tuple[Any, dict[str, Any]]] = {
    "tensor": ("tensor", {"format": "float8_e4m3fn"}),
    "row": ("row", {"format": "float8_e4m3fn_rowwise"}),
    "block": ("block", {"format": "float8_e4m3fn_blockwise", "group_size": 128}),
    "weight only": ("weight_only", {"format": "float8_e4m3fn_rowwise", "full_precision_matrix_mult": True}),
    "mx": (Scheme(weight=MX, activation=MX, scale_format="ue8m0"), {"format": "mxfp8"}),
}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 384), nn.GELU(), nn.Linear(384, 128))


@pytest.mark.parametrize("name", SCHEMES)
def test_saved_files_are_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    scheme, described = SCHEMES[name]
    model = enable_fp8_gemm(mlp(), options=FP8GemmOptions(scheme=scheme))
    path = tmp_path / "net.safetensors"
    assert save_checkpoint(model, path, format="comfy") == [path]
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]
    tensors = load_file(path)
    assert json.loads(bytes(tensors["0.comfy_quant"].tolist())) == described
    if name == "mx":
        natural = e8m0(model[0].weight._home.scaled().scale)  # type: ignore[index, union-attr, operator]
        assert torch.equal(tensors["0.weight_scale"].view(torch.uint8), in_tiles(natural))
    fresh = mlp()
    report = load_checkpoint(fresh, path)
    assert (report.format, report.suspicious, report.unused_keys) == ("comfy", (), {})
    x = torch.randn(3, 256)
    assert torch.equal(fresh(x), model(x))


def test_e5m2_is_saved_with_one_scale_only(tmp_path: Path) -> None:
    options = FP8GemmOptions(scheme="tensor", weight_dtype=torch.float8_e5m2)
    save_checkpoint(enable_fp8_gemm(mlp(), options=options), tmp_path / "a.safetensors", format="comfy")
    assert json.loads(bytes(load_file(tmp_path / "a.safetensors")["0.comfy_quant"].tolist())) == {
        "format": "float8_e5m2"
    }
    rows = enable_fp8_gemm(mlp(), options=FP8GemmOptions(weight_dtype=torch.float8_e5m2))
    with pytest.raises(UnsupportedError, match=r"0: comfy stores one scale per tensor.*float8_e5m2 \[384, 256\]"):
        save_checkpoint(rows, tmp_path / "b.safetensors", format="comfy")
    assert not (tmp_path / "b.safetensors").exists()


def test_static_scales_are_written(tmp_path: Path) -> None:
    parts = {"m.weight": fp8(64, 64), "m.weight_scale": scales(1).reshape(()), "m.input_scale": torch.tensor(0.5)}
    folder = write(tmp_path / "in", parts, {"quant_method": "fp8", "activation_scheme": "static"})
    convert_checkpoint(folder, tmp_path / "out.safetensors", format="comfy")
    checkpoint = open_checkpoint(tmp_path / "out.safetensors")
    assert checkpoint.layers["m.weight"].scheme == Scheme(weight=TENSOR, activation=TENSOR, static=True)
    assert checkpoint.input_scale("m.weight") == torch.tensor(0.5)


def test_quantize_writes_one_file(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"m.weight": torch.randn(64, 64).bfloat16(), "m.bias": torch.ones(64)})
    report = quantize_checkpoint(source, tmp_path / "out", format="comfy")
    assert report.files == (tmp_path / "out" / "model.safetensors",)
    assert open_checkpoint(tmp_path / "out").layers["m.weight"].granularity == ROW


def test_blocks_that_do_not_divide_the_matrix_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"m.weight": torch.randn(192, 192).bfloat16()})
    with pytest.raises(UnsupportedError, match=r"m: comfy stores .* square blocks that divide the matrix"):
        quantize_checkpoint(source, tmp_path / "out", scheme="block", format="comfy")
    odd = Scheme(weight=Granularity(64, 64), activation=Granularity(1, 64))
    quantize_checkpoint(source, tmp_path / "out", scheme=odd, format="comfy")


def test_a_config_beside_the_file_would_describe_it(tmp_path: Path) -> None:
    model = enable_fp8_gemm(mlp())
    save_checkpoint(model, tmp_path)
    with pytest.raises(ValueError, match=r"config\.json would be taken for the config of model\.safetensors"):
        save_checkpoint(model, tmp_path, format="comfy")
    save_checkpoint(model, tmp_path / "comfy.safetensors", format="comfy")
    assert open_checkpoint(tmp_path / "comfy.safetensors").format.name == "comfy"


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    path = single(tmp_path, partly_scaled())
    with pytest.raises(ValueError, match="holds the source"):
        convert_checkpoint(path, path, format="comfy")
    with pytest.raises(ValueError, match="holds the source"):
        convert_checkpoint(path, tmp_path, format="comfy")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.safetensors"
    save_checkpoint(enable_fp8_gemm(mlp()), path, format="comfy")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device; nothing incomplete was left there"):
        save_checkpoint(enable_fp8_gemm(mlp()), path, format="comfy")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]
