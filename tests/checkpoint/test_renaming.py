"""Key mappings that split, swap and leave out tensors, and those of original implementations of diffusers' models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fp8gemm import (
    BLOCK_128,
    GROUP_128,
    ROW,
    TENSOR,
    CheckpointError,
    FP8Linear,
    FP8Weight,
    Granularity,
    ScaledTensor,
    Split,
    Swap,
    dequantize,
    load_checkpoint,
    original_key_mapping,
    quantize,
    save_checkpoint,
)

K = 256


class Attention(nn.Module):
    def __init__(self, heights: Mapping[str, int], *, bias: bool = True) -> None:
        super().__init__()
        for name, height in heights.items():
            setattr(self, name, nn.Linear(K, height, bias=bias))


def attention(*heights: int, bias: bool = True) -> Attention:
    return Attention(dict(zip(("to_q", "to_k", "to_v"), heights, strict=False)), bias=bias)


def written(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def fused(folder: Path, rows: int, granularity: Granularity) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A checkpoint with one layer ``qkv``, and the values of its weight and bias."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(rows, K, generator=generator) * torch.rand(rows, 1, generator=generator)
    weight, bias = quantize(dense, granularity), torch.randn(rows, generator=generator)
    block = granularity not in (ROW, TENSOR)
    config = {"quant_method": "fp8", "weight_block_size": [granularity.rows, granularity.cols]} if block else None
    name = "qkv.weight_scale_inv" if block else "qkv.weight_scale"
    scale = weight.scale.reshape(()) if granularity == TENSOR else weight.scale
    tensors = {"qkv.weight": weight.data, name: scale, "qkv.bias": bias}
    return written(folder, tensors, config), dequantize(weight, torch.float32), bias


QKV = {r"^qkv\.": Split(("to_q.", "to_k.", "to_v."))}


@pytest.mark.parametrize(
    ("granularity", "heights", "found"),
    [
        (TENSOR, (96, 32, 64), [TENSOR] * 3),
        (ROW, (96, 32, 64), [ROW] * 3),
        (BLOCK_128, (128, 256, 64), [BLOCK_128] * 3),
        (BLOCK_128, (128, 192, 128), [BLOCK_128, BLOCK_128, GROUP_128]),
        (BLOCK_128, (64, 64, 128), [BLOCK_128] * 3),
    ],
    ids=["tensor", "row", "blocks", "cut block", "parts of a block"],
)
def test_a_split_weight_keeps_every_value(
    granularity: Granularity, heights: tuple[int, ...], found: list[Granularity], tmp_path: Path
) -> None:
    folder, weight, bias = fused(tmp_path, sum(heights), granularity)
    model = attention(*heights)
    report = load_checkpoint(model, folder, key_mapping=QKV)
    assert not report.unexpected
    assert not report.missing
    layers = [model.to_q, model.to_k, model.to_v]
    for layer, want, offset, own in zip(layers, weight.split(heights), bias.split(heights), found, strict=True):
        assert isinstance(layer, FP8Linear)
        assert isinstance(layer.weight, FP8Weight)
        assert torch.equal(layer.weight.dequantize(), want)
        assert torch.equal(layer.bias, offset)
        assert layer.weight._home.scaled().granularity == own


@pytest.mark.parametrize("granularity", [TENSOR, ROW, BLOCK_128], ids=str)
def test_swapped_halves(granularity: Granularity, tmp_path: Path) -> None:
    folder, weight, bias = fused(tmp_path, 384, granularity)  # halves of one and a half blocks
    model = attention(384)
    load_checkpoint(model, folder, key_mapping={"^qkv": Swap("to_q")})
    assert isinstance(model.to_q, FP8Linear)
    assert torch.equal(model.to_q.weight.dequantize(), torch.cat([weight[192:], weight[:192]]))
    assert torch.equal(model.to_q.bias, torch.cat([bias[192:], bias[:192]]))


def test_dense_weights_and_dequantized_ones_are_split_alike(tmp_path: Path) -> None:
    folder, weight, bias = fused(tmp_path / "fp8", 192, ROW)
    dense = written(tmp_path / "dense", {"qkv.weight": weight, "qkv.bias": bias})
    for source, dequantized in ((folder, True), (dense, False)):
        model = attention(96, 32, 64)
        load_checkpoint(model, source, key_mapping=QKV, dequantize=dequantized)
        assert type(model.to_v) is nn.Linear
        assert torch.equal(model.to_v.weight, weight[128:])
        assert torch.equal(model.to_k.bias, bias[96:128])


def test_parts_share_the_static_activation_scale(tmp_path: Path) -> None:
    weight = quantize(torch.randn(64, K), TENSOR)
    tensors = {
        "qkv.weight": weight.data,
        "qkv.weight_scale": weight.scale.reshape(()),
        "qkv.input_scale": torch.tensor(0.5),
    }
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    model = attention(32, 32, bias=False)
    load_checkpoint(model, written(tmp_path, tensors, config), key_mapping={"qkv": Split(("to_q", "to_k"))})
    assert [layer.input_scale.item() for layer in (model.to_q, model.to_k)] == [0.5, 0.5]


def test_parts_can_be_joined_again(tmp_path: Path) -> None:
    """Rows of two tensors in another arrangement: each is split, and parts of both become one."""
    first, second = quantize(torch.randn(64, K), ROW), quantize(torch.randn(64, K), ROW)
    tensors = {f"{name}.weight": one.data for name, one in (("a", first), ("b", second))}
    tensors |= {f"{name}.weight_scale": one.scale for name, one in (("a", first), ("b", second))}
    mapping = {"^a": Split(("to_q", "to_k"), (16, 48)), "^b": Split(("to_q", "to_k"), (32, 32))}
    model = attention(48, 80, bias=False)
    load_checkpoint(model, written(tmp_path, tensors), key_mapping=mapping)
    one, two = dequantize(first, torch.float32), dequantize(second, torch.float32)
    assert torch.equal(model.to_q.weight.dequantize(), torch.cat([one[:16], two[:32]]))
    assert torch.equal(model.to_k.weight.dequantize(), torch.cat([one[16:], two[32:]]))


def test_a_part_that_the_model_lacks_is_not_passed_over(tmp_path: Path) -> None:
    folder, weight, _ = fused(tmp_path, 192, ROW)
    model = attention(96, 32)
    with pytest.raises(CheckpointError, match=r"not in the model: .*qkv\.weight \(rows of to_v\.weight\)"):
        load_checkpoint(model, folder, key_mapping=QKV)
    report = load_checkpoint(model, folder, key_mapping=QKV, strict=False)
    assert sorted(report.unexpected) == ["qkv.bias (rows of to_v.bias)", "qkv.weight (rows of to_v.weight)"]
    assert torch.equal(model.to_k.weight.dequantize(), weight[96:128])
    with pytest.raises(CheckpointError, match=r"not in the model: qkv\.weight, qkv\.bias"):
        load_checkpoint(attention(96), folder, key_mapping=QKV)


def test_weights_of_other_quantizations_are_refused_by_their_own_name(tmp_path: Path) -> None:
    codes = torch.zeros(192, K, dtype=torch.int8)
    folder = written(tmp_path, {"qkv.weight": codes, "qkv.weight_scale": torch.ones(192, 1)})
    with pytest.raises(CheckpointError, match=r"qkv\.weight.* torch\.int8"):
        load_checkpoint(attention(96, 32, 64, bias=False), folder, key_mapping=QKV)


def test_replacements_refer_to_groups_of_the_pattern(tmp_path: Path) -> None:
    tensors = {f"layers.{index}.qkv.weight": torch.full((96, K), index + 1.0) for index in range(2)}
    model = nn.ModuleDict({"blocks": nn.ModuleList([attention(64, 32, bias=False) for _ in range(2)])})
    mapping = {r"^layers\.(\d+)\.qkv\.": Split((r"blocks.\1.to_q.", r"blocks.\1.to_k."))}
    load_checkpoint(model, written(tmp_path, tensors), key_mapping=mapping)
    assert torch.equal(model["blocks"][1].to_k.weight, torch.full((32, K), 2.0))


def test_what_is_left_out_is_reported(tmp_path: Path) -> None:
    folder = written(tmp_path, {"to_q.weight": torch.ones(32, K), "old.weight": torch.ones(3)})
    report = load_checkpoint(attention(32, bias=False), folder, key_mapping={r"^old\.": None})
    assert report.unexpected == ("old.weight",)


@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        (
            {"^qkv": Split(("to_q", "to_k"), (96, 32))},
            CheckpointError,
            r"qkv\.weight .*cannot be split into to_q\.weight \(96",
        ),
        (
            {"^qkv": Split(("to_q", "to_k"))},
            CheckpointError,
            r"cannot be split into to_q\.weight \(96 rows\), to_k\.weight \(32",
        ),
        ({"^qkv": Swap("a"), "^a": Swap("b")}, ValueError, r"splits qkv\.weight twice"),
        ({"(qkv": "to_q"}, ValueError, r"'\(qkv', which is no regular expression"),
    ],
)
def test_mappings_that_do_not_fit(
    mapping: dict[str, str | Split], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder, _, _ = fused(tmp_path, 192, ROW)
    with pytest.raises(error, match=message):
        load_checkpoint(attention(96, 32), folder, key_mapping=mapping)


def test_arguments_of_a_split() -> None:
    with pytest.raises(ValueError, match="tuple of replacements, found 'to_q'"):
        Split("to_q")
    with pytest.raises(ValueError, match="one size for each"):
        Split(("to_q", "to_k"), (1,))


def test_halves_need_an_even_number_of_rows(tmp_path: Path) -> None:
    folder = written(tmp_path, {"a.weight": torch.ones(33, K)})
    with pytest.raises(CheckpointError, match=r"a\.weight has 33 rows"):
        load_checkpoint(attention(33, bias=False), folder, key_mapping={"^a": Swap("to_q")})


def test_models_with_split_tensors_are_saved_under_their_own_names(tmp_path: Path) -> None:
    folder, weight, _ = fused(tmp_path / "fused", 192, ROW)
    model, again = attention(96, 32, 64), attention(96, 32, 64)
    load_checkpoint(model, folder, key_mapping=QKV)
    save_checkpoint(model, tmp_path / "saved")
    load_checkpoint(again, tmp_path / "saved")
    assert torch.equal(again.to_v.weight.dequantize(), weight[128:])


# --- the names of original implementations ---------------------------------------------------------------------------


class SingleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention({"to_q": 128, "to_k": 128, "to_v": 128})
        self.proj_mlp = nn.Linear(K, 512)
        self.proj_out = nn.Linear(640, K)


class FluxTransformer2DModel(nn.Module):
    """The single blocks and the end of a model like diffusers' of this name."""

    __module__ = "diffusers.stand_in"

    def __init__(self) -> None:
        super().__init__()
        self.single_transformer_blocks = nn.ModuleList([SingleBlock(), SingleBlock()])
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(K, 2 * K)})
        self.proj_out = nn.Linear(K, 64)


def original_flux(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    shapes = {f"single_blocks.{block}.linear1": (896, K) for block in range(2)}
    shapes |= {f"single_blocks.{block}.linear2": (K, 640) for block in range(2)}
    shapes |= {"final_layer.linear": (64, K), "final_layer.adaLN_modulation.1": (2 * K, K)}
    stored = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    values = {}
    for name, shape in shapes.items():
        weight: ScaledTensor = quantize(torch.randn(shape), TENSOR)
        values[f"{name}.weight"], values[f"{name}.bias"] = dequantize(weight, torch.float32), torch.randn(shape[0])
        key = f"model.diffusion_model.{name}"
        stored |= {f"{key}.weight": weight.data, f"{key}.scale_weight": weight.scale.reshape(())}
        stored[f"{key}.bias"] = values[f"{name}.bias"]
    save_file(stored, folder / "flux.safetensors")
    return folder / "flux.safetensors", values


@pytest.mark.parametrize("by", ["class", "argument"])
def test_original_names_of_flux(by: str, tmp_path: Path) -> None:
    file, values = original_flux(tmp_path)
    model: nn.Module = FluxTransformer2DModel()
    mapping = None
    if by == "argument":
        model = nn.ModuleDict(dict(model.named_children()))
        mapping = original_key_mapping(model, "FluxTransformer2DModel")
        with pytest.raises(CheckpointError, match="does not fit the model"):
            load_checkpoint(model, file)
    report = load_checkpoint(model, file, key_mapping=mapping)
    assert len(report.converted) == 12
    assert not report.unexpected
    state = dict(model.named_parameters())
    for block in range(2):
        prefix, heights = f"single_transformer_blocks.{block}.", (128, 128, 128, 512)
        for kind in ("weight", "bias"):
            names = [f"{prefix}{name}.{kind}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
            for name, want in zip(names, values[f"single_blocks.{block}.linear1.{kind}"].split(heights), strict=True):
                got = state[name]
                assert torch.equal(got.dequantize() if isinstance(got, FP8Weight) else got, want), name
    shift, scale = values["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(state["norm_out.linear.weight"].dequantize(), torch.cat([scale, shift]))


def test_unknown_classes_are_named() -> None:
    with pytest.raises(ValueError, match=r"original names are known for .*FluxTransformer2DModel.*, not for Linear"):
        original_key_mapping(nn.Linear(1, 1))
