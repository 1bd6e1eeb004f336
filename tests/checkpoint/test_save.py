"""Saving, converting and quantizing: what is written is read back byte for byte, and nothing half-written stays."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BLOCKS, Net, compressed, e8m0, fp8, net_tensors, powers, scales, write
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fp8gemm import (
    BLOCK_128,
    ROW,
    CheckpointError,
    FP8GemmOptions,
    FP8Linear,
    ScaledTensor,
    Scheme,
    UnsupportedError,
    enable_fp8_gemm,
    quantize,
)
from fp8gemm.checkpoint import (
    convert_checkpoint,
    load_checkpoint,
    open_checkpoint,
    quantize_checkpoint,
    save_checkpoint,
)
from fp8gemm.checkpoint import (
    write as writing,
)

STATIC = {"up.input_scale": torch.tensor([0.5]), "down.input_scale": torch.tensor([0.25])}
# name -> scales and the config of a Net on disk, and the format that it can be saved in
SOURCES: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "rows": (
        {"up.weight_scale": scales(96, 1), "down.weight_scale": scales(160, 1)},
        compressed("channel", "token"),
        "compressed-tensors",
    ),
    "rows-in-bf16": (
        {"up.weight_scale": scales(96, 1).bfloat16(), "down.weight_scale": scales(160, 1).bfloat16()},
        compressed("channel", "token"),
        "compressed-tensors",
    ),
    "static": (
        {"up.weight_scale": scales(1), "down.weight_scale": scales(1, seed=8), **STATIC},
        compressed("tensor", "tensor"),
        "compressed-tensors",
    ),
    "weight-only": (
        {"up.weight_scale": scales(96, 1), "down.weight_scale": scales(160, 1)},
        compressed("channel", None),
        "compressed-tensors",
    ),
    "weight-only-blocks": (
        {"up.weight_scale": scales(1, 2), "down.weight_scale": scales(2, 1)},
        compressed("block", None, block_structure=[128, 128]),
        "compressed-tensors",
    ),
    "blocks": (
        {"up.weight_scale_inv": scales(1, 2), "down.weight_scale_inv": scales(2, 1)},
        BLOCKS,
        "fine-grained",
    ),
    "powers": (
        {
            "up.weight_scale_inv": e8m0(powers(1, 2)).view(torch.float8_e8m0fnu),
            "down.weight_scale_inv": e8m0(powers(2, 1)).view(torch.float8_e8m0fnu),
        },
        {**BLOCKS, "scale_fmt": "ue8m0"},
        "fine-grained",
    ),
    "mx": (
        {"up.weight_scale": e8m0(powers(96, 5)), "down.weight_scale": e8m0(powers(160, 3))},
        compressed("group", "group", group_size=32),
        "compressed-tensors",
    ),
    "static-tensors": (
        {
            "up.weight_scale_inv": scales(1).reshape(()),
            "down.weight_scale_inv": scales(1, seed=8).reshape(()),
            "up.activation_scale": torch.tensor(0.5),
            "down.activation_scale": torch.tensor(0.25),
        },
        {**BLOCKS, "weight_block_size": None, "activation_scheme": "static"},
        "fine-grained",
    ),
}
SOURCES["mx"][1]["config_groups"]["group_0"]["input_activations"]["group_size"] = 32


def source(folder: Path, name: str) -> Path:
    parts, config, _ = SOURCES[name]
    return write(folder, {**net_tensors(), **parts}, config, model_config={"model_type": "net", "hidden": 96})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for path in sorted(folder.glob("*.safetensors")) for key, t in load_file(path).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(
        a[key].dtype == b[key].dtype
        and a[key].shape == b[key].shape
        and torch.equal(a[key].flatten().view(torch.uint8), b[key].flatten().view(torch.uint8))
        for key in a
    )


@pytest.mark.parametrize("name", SOURCES)
def test_loaded_and_saved_is_the_same_file(name: str, tmp_path: Path) -> None:
    folder = source(tmp_path / "in", name)
    model = Net()
    load_checkpoint(model, folder)
    files = save_checkpoint(model, tmp_path / "out", format=SOURCES[name][2])
    assert [path.name for path in files] == ["model.safetensors", "config.json"]
    assert same(tensors_of(folder), tensors_of(tmp_path / "out"))
    again = Net()
    load_checkpoint(again, tmp_path / "out")
    for first, second in ((model.up, again.up), (model.down, again.down)):
        assert isinstance(first, FP8Linear)
        assert isinstance(second, FP8Linear)
        assert first.scheme == second.scheme


@pytest.mark.parametrize("name", SOURCES)
def test_converting_to_the_same_format_changes_no_byte(name: str, tmp_path: Path) -> None:
    folder = source(tmp_path / "in", name)
    report = convert_checkpoint(folder, tmp_path / "out", format=SOURCES[name][2])
    assert same(tensors_of(folder), tensors_of(tmp_path / "out"))
    assert report.bytes_before == report.bytes_after
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["hidden"]) == ("net", 96)
    a, b = open_checkpoint(folder), open_checkpoint(tmp_path / "out")
    assert {n: layer.scheme for n, layer in a.layers.items()} == {n: layer.scheme for n, layer in b.layers.items()}


@pytest.mark.parametrize("scheme", ["row", "tensor", "block", "weight_only"])
def test_a_patched_model_is_saved_and_loaded(scheme: Any, tmp_path: Path) -> None:
    model = Net()
    enable_fp8_gemm(model, options=FP8GemmOptions(scheme=scheme))
    save_checkpoint(model, tmp_path)
    again = Net()
    load_checkpoint(again, tmp_path)
    x = torch.randn(4, 160).bfloat16()
    assert torch.equal(model(x), again(x))


def test_shards_with_an_index(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", "rows")
    model = Net()
    load_checkpoint(model, folder)
    files = save_checkpoint(model, tmp_path / "out", max_shard_size=16000)
    names = [path.name for path in files]
    assert names == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "config.json",
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for key, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as handle:
            assert key in handle.keys()  # noqa: SIM118
    assert index["weight_map"]["up.weight"] == index["weight_map"]["up.weight_scale"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    assert same(tensors_of(folder), tensors_of(tmp_path / "out"))
    save_checkpoint(model, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(("size", "reason"), [("5 apples", "'5GB'"), (0, "at least one byte"), ("-1GB", "'5GB'")])
def test_shard_sizes_that_are_none(size: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        save_checkpoint(Net(), tmp_path / "out", max_shard_size=size)


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "head": nn.Linear(32, 64, bias=False)})
    model["head"].weight = model["embed"].weight
    save_checkpoint(model, tmp_path)
    assert list(tensors_of(tmp_path)) == ["embed.weight"]


class Config:
    def to_json_string(self) -> str:
        return json.dumps({"model_type": "mixtral", "quantization_config": {"quant_method": "old"}})


def test_stacked_experts_are_written_under_the_names_of_files(tmp_path: Path) -> None:
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.gate = nn.Linear(8, 2, bias=False)
    model.mlp.experts = nn.Module()
    model.mlp.experts.gate_up_proj = nn.Parameter(torch.randn(2, 12, 8))
    model.mlp.experts.down_proj = nn.Parameter(torch.randn(2, 8, 6))
    save_checkpoint(model, tmp_path / "a")
    found = tensors_of(tmp_path / "a")
    assert torch.equal(found["mlp.experts.1.up_proj.weight"], model.mlp.experts.gate_up_proj[1, 6:])
    assert len(found) == 1 + 6
    model.config = Config()
    save_checkpoint(model, tmp_path / "b")
    found = tensors_of(tmp_path / "b")
    assert torch.equal(found["block_sparse_moe.experts.0.w1.weight"], model.mlp.experts.gate_up_proj[0, :6])
    assert torch.equal(found["block_sparse_moe.experts.0.w2.weight"], model.mlp.experts.down_proj[0])
    assert torch.equal(found["block_sparse_moe.gate.weight"], model.mlp.gate.weight)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config == {"model_type": "mixtral", "architectures": ["Module"]}, "nothing is FP8: nothing says it is"


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(2, 2 * 160, 128))
        self.experts.down_proj = nn.Parameter(torch.randn(2, 128, 160))


@pytest.mark.parametrize("scheme", ["row", "tensor", "block"])
def test_fp8_experts_are_written_one_by_one(scheme: Any, tmp_path: Path) -> None:
    """Halves of 160 rows end inside blocks of 128: up is then written with a scale for each row of a block."""
    model = enable_fp8_gemm(Mlp(), options=FP8GemmOptions(scheme=scheme, engine="reference"))
    answers = {name: getattr(model.experts, name).dequantize() for name in ("gate_up_proj", "down_proj")}
    if scheme == "block":
        with pytest.raises(UnsupportedError, match="the same scheme for all layers, found 2"):
            save_checkpoint(model, tmp_path, format="fine-grained")
    save_checkpoint(model, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.layers) == 6
    for name, answer in answers.items():
        assert torch.equal(checkpoint.dequantize(f"experts.{name}"), answer)


@pytest.mark.parametrize(
    ("name", "format", "reason"),
    [
        ("rows", "fine-grained", "up: fine-grained supports blocks or one scale per tensor, found row"),
        ("weight-only", "fine-grained", "found row"),
        ("weight-only-blocks", "fine-grained", "up: fine-grained requires quantized activations, found weight-only"),
        ("rows", "gguf", "checkpoints can be written as compressed-tensors, fine-grained or comfy, found 'gguf'"),
    ],
)
def test_what_a_format_cannot_express_is_refused_before_a_byte(
    name: str, format: str, reason: str, tmp_path: Path
) -> None:
    folder = source(tmp_path / "in", name)
    model = Net()
    load_checkpoint(model, folder)
    for write_it in (save_checkpoint, convert_checkpoint):
        with pytest.raises(UnsupportedError, match=reason):
            write_it(model if write_it is save_checkpoint else folder, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_e5m2_is_refused(tmp_path: Path) -> None:
    model = Net()
    enable_fp8_gemm(model, options=FP8GemmOptions(weight_dtype=torch.float8_e5m2, scheme="weight_only"))
    with pytest.raises(
        UnsupportedError, match=r"up: compressed-tensors stores float8_e4m3fn, found torch\.float8_e5m2"
    ):
        save_checkpoint(model, tmp_path / "out")


@pytest.mark.parametrize("call", [1, 3])
def test_a_full_disk_leaves_what_was_there(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path / "in", "rows")
    model = Net()
    load_checkpoint(model, folder)
    save_checkpoint(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    original, calls = writing._write_tensor, []

    def full(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*arguments)

    monkeypatch.setattr(writing, "_write_tensor", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*out: No space left on device; nothing incomplete"):
        save_checkpoint(model, tmp_path / "out", max_shard_size=16000)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_meta_weights_are_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"up\.weight is on meta"):
        save_checkpoint(Net(), tmp_path / "out")


# ---- convert


def test_static_tensors_become_fine_grained_and_back(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", "static")
    convert_checkpoint(folder, tmp_path / "fine", format="fine-grained")
    convert_checkpoint(tmp_path / "fine", tmp_path / "back")
    assert same(tensors_of(folder), tensors_of(tmp_path / "back"))
    assert set(tensors_of(tmp_path / "fine")) >= {"up.weight_scale_inv", "up.activation_scale"}


def test_raw_casts_become_checkpoints_that_say_what_they_are(tmp_path: Path) -> None:
    raw = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in net_tensors().items()}
    folder = write(tmp_path / "in", raw)
    convert_checkpoint(folder / "model.safetensors", tmp_path / "out")
    a, b = open_checkpoint(folder / "model.safetensors"), open_checkpoint(tmp_path / "out")
    assert b.format.name == "compressed-tensors"
    assert b.unused_keys == {}
    for name in a:
        assert torch.equal(a.dequantize(name), b.dequantize(name))
    assert tensors_of(tmp_path / "out")["up.bias"].dtype == torch.bfloat16


def test_kv_scales_and_companions_go_along(tmp_path: Path) -> None:
    tensors = {"a.k_proj.weight": fp8(8, 32), "a.k_proj.weight_scale": scales(8, 1)}
    tensors |= {"a.k_proj.k_scale": torch.tensor(0.5), "a.v_proj.output_scale": torch.tensor(0.25)}
    folder = write(tmp_path / "in", tensors, {"quant_method": "modelopt", "quant_algo": "FP8"})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    convert_checkpoint(folder, tmp_path / "out")
    out = open_checkpoint(tmp_path / "out")
    assert {name: float(scale) for name, scale in out.kv_scales.items()} == {"a.k_scale": 0.5, "a.v_scale": 0.25}
    assert out.config["kv_cache_scheme"]["num_bits"] == 8
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_source_and_target_must_differ(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", "rows")
    for function in (convert_checkpoint, quantize_checkpoint):
        with pytest.raises(ValueError, match="holds the source; choose another directory"):
            function(folder, folder)


def test_converting_needs_fp8(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"w.weight": torch.ones(4, 4)})
    with pytest.raises(CheckpointError, match="holds no FP8 weights; quantize_checkpoint creates them"):
        convert_checkpoint(folder, tmp_path / "out")


# ---- quantize


def dense(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(64, 160, generator=generator),
        "model.up.weight": torch.randn(200, 160, generator=generator),
        "model.up.bias": torch.randn(200, generator=generator),
        "model.down.weight": torch.randn(160, 200, generator=generator),
        "model.norm.weight": torch.ones(160),
        "lm_head.weight": torch.randn(64, 160, generator=generator),
    }
    bf16 = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    return write(folder, bf16, model_config={"model_type": "net"})


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        ("row", "compressed-tensors"),
        ("tensor", "compressed-tensors"),
        ("block", "compressed-tensors"),
        ("block", "fine-grained"),
        (Scheme(weight=BLOCK_128, activation=ROW, scale_format="ue8m0"), "compressed-tensors"),
    ],
)
def test_quantized_checkpoints_hold_what_quantize_gives(scheme: Any, format: str, tmp_path: Path) -> None:
    folder = dense(tmp_path / "in")
    report = quantize_checkpoint(folder, tmp_path / "out", scheme=scheme, format=format)
    assert report.layers == ("model.down", "model.up")
    assert report.kept["model.embed_tokens"] == "ignored by *embed*"
    assert "an output head" in report.kept["lm_head"]
    assert "fp8_heads=True" in report.kept["lm_head"]
    resolved = FP8GemmOptions(scheme=scheme).resolved_scheme
    source, out = open_checkpoint(folder), open_checkpoint(tmp_path / "out")
    for name in ("model.up.weight", "model.down.weight"):
        x = source[name]
        assert isinstance(x, torch.Tensor)
        expected = quantize(x, resolved.weight, scale_format=resolved.scale_format)
        found = out[name]
        assert isinstance(found, ScaledTensor)
        assert torch.equal(found.data.view(torch.uint8), expected.data.view(torch.uint8))
        assert torch.equal(found.scale, expected.scale)
        assert found.granularity == resolved.weight
    assert torch.equal(out.dequantize("lm_head.weight"), source.dequantize("lm_head.weight"))
    assert out.layers["model.up.weight"].scheme.activation == resolved.activation
    assert out.layout.suspicious == []


@pytest.mark.parametrize("head", ["lm_head", "transformer.output_layer", "embed_out", "output"])
def test_heads_are_quantized_only_when_asked(head: str, tmp_path: Path) -> None:
    tensors = {f"{head}.weight": torch.randn(64, 64), "up.weight": torch.randn(64, 64)}
    folder = write(tmp_path / "in", tensors, model_config={"model_type": "net"})
    report = quantize_checkpoint(folder, tmp_path / "dense")
    assert (report.layers, list(report.kept)) == (("up",), [head])
    report = quantize_checkpoint(folder, tmp_path / "fp8", fp8_heads=True)
    assert (set(report.layers), dict(report.kept)) == ({"up", head}, {})
    tied = write(tmp_path / "tied", tensors, model_config={"model_type": "net", "tie_word_embeddings": True})
    assert list(quantize_checkpoint(tied, tmp_path / "kept", fp8_heads=True).kept) == [head]


def test_ignore_takes_names_wildcards_and_regexes(tmp_path: Path) -> None:
    folder = dense(tmp_path / "in")
    report = quantize_checkpoint(folder, tmp_path / "out", ignore=["re:model.u", "*.embed_*"])
    assert report.layers == ("model.down",)
    assert report.kept["model.up"] == "ignored by re:model.u"
    with pytest.raises(ValueError, match=r"ignore patterns that match no module: model\.upp"):
        quantize_checkpoint(folder, tmp_path / "other", ignore=["model.upp"])


def test_stacked_experts_are_quantized_one_by_one(tmp_path: Path) -> None:
    gate_up, down = torch.randn(2, 24, 16), torch.randn(2, 16, 12)
    tensors = {"m.mlp.experts.gate_up_proj": gate_up, "m.mlp.experts.down_proj": down, "m.mlp.gate.weight": down[0]}
    out = tmp_path / "out"
    report = quantize_checkpoint(write(tmp_path / "in", tensors), out)
    assert len(report.layers) == 6
    found = open_checkpoint(out)["m.mlp.experts.1.up_proj.weight"]
    assert isinstance(found, ScaledTensor)
    assert torch.equal(found.data.view(torch.uint8), quantize(gate_up[1, 12:]).data.view(torch.uint8))
    assert report.kept == {"m.mlp.gate": "ignored by *.gate"}


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    w = torch.randn(32, 32)
    w[3, 4] = torch.inf
    with pytest.raises(CheckpointError, match=r"m\.weight holds 1 non-finite values"):
        quantize_checkpoint(write(tmp_path / "in", {"m.weight": w}), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_quantizing_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    folder = dense(tmp_path / "in")
    static = Scheme(weight=BLOCK_128, activation=BLOCK_128, static=True)
    with pytest.raises(ValueError, match="static activation scales require calibration"):
        quantize_checkpoint(folder, tmp_path / "out", scheme=static)
    with pytest.raises(UnsupportedError, match="fine-grained supports blocks or one scale per tensor, found row"):
        quantize_checkpoint(folder, tmp_path / "out", format="fine-grained")
    with pytest.raises(CheckpointError, match="is already FP8; convert_checkpoint changes its format"):
        quantize_checkpoint(source(tmp_path / "fp8", "rows"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no matrices to quantize: 1 are ignored"):
        quantize_checkpoint(write(tmp_path / "one", {"lm_head.weight": torch.ones(2, 2)}), tmp_path / "out")


def test_shards_are_on_disk_before_they_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that goes down after a save has the old files or whole new ones, never names without their bytes."""
    events: list[tuple[str, int]] = []  # by inode, which a rename keeps
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        events.append(("flushed", os.fstat(handle).st_ino))
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        events.append(("renamed", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    save_checkpoint(enable_fp8_gemm(Net()), tmp_path, max_shard_size=8000)
    shards = {path.stat().st_ino for path in tmp_path.glob("*.safetensors")}
    assert len(shards) > 2
    for inode in shards:
        assert ("flushed", inode) in events[: events.index(("renamed", inode))]


def test_tensors_begin_at_multiples_of_eight(tmp_path: Path) -> None:
    """As the reference writer has them, so that readers can map float64 where it lies; names of every length."""
    for extra in range(8):
        tensors = {"up": nn.Linear(160, 96), "x" * (extra + 1): nn.LayerNorm(96)}
        save_checkpoint(enable_fp8_gemm(nn.ModuleDict(tensors)), tmp_path / str(extra))
        start = (tmp_path / str(extra) / "model.safetensors").read_bytes()[:8]
        assert int.from_bytes(start, "little") % 8 == 0
