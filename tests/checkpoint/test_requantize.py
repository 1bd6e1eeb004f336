"""What is FP8 in a model and dense on disk is FP8 again when it is loaded, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fp8gemm import CheckpointError, FP8GemmOptions, FP8Weight, enable_fp8_gemm, load_checkpoint, save_checkpoint


class Model(nn.Module):
    """A patchwise convolution, a tied head, attention's packed projection and a transposed weight of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 64, 4, 4, dtype=dtype)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True, dtype=dtype)
        self.mix = nn.Parameter(torch.randn(64, 64, dtype=dtype) / 8)
        self.table = nn.Embedding(32, 64, dtype=dtype)
        self.head = nn.Linear(64, 32, bias=False, dtype=dtype)
        self.head.weight = self.table.weight

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([x, self.table(ids)], dim=1) @ self.mix
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 3, 16, 16, dtype=dtype), torch.arange(10).view(2, 5)


def patched(scheme: str, dtype: torch.dtype, **options: object) -> Model:
    chosen = FP8GemmOptions(scheme=scheme, **options)  # type: ignore[arg-type]
    return enable_fp8_gemm(Model(dtype).eval(), options=chosen, example_inputs=inputs(dtype))


def empty(dtype: torch.dtype) -> Model:
    with torch.device("meta"):
        return Model(dtype).eval()


def fp8(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if isinstance(p, FP8Weight)}


@pytest.mark.parametrize("storage", ["discard", "keep"])
@pytest.mark.parametrize("scheme", ["row", "tensor", "block"])
@torch.no_grad()
def test_a_loaded_model_computes_what_the_saved_one_does(scheme: str, storage: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    model = patched(scheme, dtype, fp16_weight_storage=storage)
    expected = model(*inputs(dtype))
    save_checkpoint(model, tmp_path, format="fine-grained" if scheme == "block" else "compressed-tensors")
    loaded = empty(dtype)
    load_checkpoint(loaded, tmp_path)
    assert fp8(loaded) == fp8(model) >= {"patches.weight", "mix", "attention.in_proj_weight", "head.weight"}
    assert loaded.head.weight is loaded.table.weight
    assert torch.equal(loaded(*inputs(dtype)), expected)
    for name, weight in model.named_parameters():
        if isinstance(weight, FP8Weight):
            found, given = loaded.get_parameter(name).scaled(), weight.scaled()
            assert torch.equal(found.data.view(torch.uint8), given.data.view(torch.uint8)), name
            assert torch.equal(found.scale, given.scale), name


@torch.no_grad()
def test_in_float32_scales_differ_in_their_last_bit_at_most(tmp_path: Path) -> None:
    model = patched("row", torch.float32)
    save_checkpoint(model, tmp_path)
    loaded = empty(torch.float32)
    load_checkpoint(loaded, tmp_path)
    expected = model(*inputs(torch.float32))
    assert (loaded(*inputs(torch.float32)) - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
def test_other_readers_see_dense_weights(tmp_path: Path) -> None:
    model = patched("row", torch.bfloat16)
    save_checkpoint(model, tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    for name in ("patches.weight", "mix", "table.weight"):
        assert torch.equal(file[name], model.get_parameter(name).dequantize())
    loaded = empty(torch.bfloat16)
    load_checkpoint(loaded, tmp_path, dequantize=True)
    assert not fp8(loaded)


def test_weights_only_stay_weights_only(tmp_path: Path) -> None:
    save_checkpoint(patched("row", torch.bfloat16), tmp_path)
    loaded = empty(torch.bfloat16)
    load_checkpoint(loaded, tmp_path, options=FP8GemmOptions(scheme="weight_only"))
    assert {loaded.get_parameter(name).scheme.activation for name in fp8(loaded)} == {None}


@pytest.mark.parametrize(
    "text",
    ["no JSON", "[]", "{}", '{"scheme": 3}', '{"scheme": {}, "dtype": "int8", "layout": {}, "input_scale": null}'],
)
def test_metadata_that_says_nothing_is_refused(text: str, tmp_path: Path) -> None:
    _rewritten(tmp_path, lambda described: text)
    with pytest.raises(CheckpointError, match=r"how to quantize patches\.weight"):
        load_checkpoint(empty(torch.bfloat16), tmp_path)


def test_metadata_of_another_shape_is_refused(tmp_path: Path) -> None:
    def other(text: str) -> str:
        described = json.loads(text)
        described["layout"]["folded"] = [32, 6, 4, 4]
        return json.dumps(described)

    _rewritten(tmp_path, other)
    with pytest.raises(
        CheckpointError, match=r"patches\.weight was saved from .* \[32, 6, 4, 4\], found \[64, 3, 4, 4\]"
    ):
        load_checkpoint(empty(torch.bfloat16), tmp_path)


def _rewritten(folder: Path, change) -> None:
    save_checkpoint(patched("row", torch.bfloat16), folder)
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    key = "fp8gemm.quantize.patches.weight"
    metadata[key] = change(metadata[key])
    save_file(load_file(file), file, metadata)


@torch.no_grad()
def test_a_patched_model_takes_what_another_saved(tmp_path: Path) -> None:
    dtype = torch.bfloat16
    other = patched("row", dtype)
    for weight in other.parameters():
        weight.mul_(1.5)
    save_checkpoint(other, tmp_path)
    model = patched("tensor", dtype)
    model(*inputs(dtype))
    load_checkpoint(model, tmp_path)
    assert fp8(model) == fp8(other)
    assert model.head.weight is model.table.weight
    y, expected = model(*inputs(dtype)), other(*inputs(dtype))
    assert (y - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("storage", ["discard", "keep"])
@pytest.mark.parametrize("search", ["scales", "rounding"])
@torch.no_grad()
def test_scales_that_were_searched_for_are_in_the_metadata(search: str, storage: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    options = FP8GemmOptions(weight_search=search, fp16_weight_storage=storage)  # type: ignore[arg-type]
    given = inputs(dtype)
    model = enable_fp8_gemm(Model(dtype).eval(), options=options, example_inputs=given, calibration_inputs=given)
    save_checkpoint(model, tmp_path)
    loaded = empty(dtype)
    load_checkpoint(loaded, tmp_path)
    assert torch.equal(loaded(*given), model(*given))
    save_checkpoint(loaded, tmp_path / "again")  # of which nobody knows how its scales were found
    again = empty(dtype)
    load_checkpoint(again, tmp_path / "again")
    assert torch.equal(again(*given), model(*given))


@pytest.mark.parametrize("scale", ["", "AAAA", "?", "AADAfw==", 7])
def test_scales_that_are_none_are_refused(scale: object, tmp_path: Path) -> None:
    _rewritten(tmp_path, lambda text: json.dumps({**json.loads(text), "scale": scale}))
    with pytest.raises(CheckpointError, match=r"how to quantize patches\.weight"):
        load_checkpoint(empty(torch.bfloat16), tmp_path)
