"""``save_pretrained`` of a patched transformers model writes a checkpoint that says it is FP8, or refuses."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from fp8gemm import (
    FP8GemmOptions,
    FP8Linear,
    UnsupportedError,
    disable_fp8_gemm,
    enable_fp8_gemm,
    load_checkpoint,
    save_checkpoint,
)

TOKENS = torch.arange(11).view(1, 11) % 64


def llama(*, tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def same_weights(folder: Path, model: nn.Module) -> bool:
    """Whether the folder holds exactly the model's FP8 bytes and scales, and its head dense, and is loaded alike."""
    with torch.device("meta"):
        loaded = llama()
    load_checkpoint(loaded, folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("lm_head.weight"), dense_head(model))
        assert "lm_head.weight_scale" not in file.keys()  # noqa: SIM118
    found, expected = loaded.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    if "lm_head.weight_scale" in expected:  # quantized again from float32 values: may differ in the last bit
        assert torch.allclose(found["lm_head.weight_scale"], expected.pop("lm_head.weight_scale"), rtol=2e-7, atol=0)
    return all(torch.equal(_plain(found[name]), _plain(expected[name])) for name in expected)


def dense_head(model: nn.Module) -> torch.Tensor:
    head = model.lm_head
    if not isinstance(head, FP8Linear):
        return head.weight.detach()
    original = head.weight._home.original
    return head.weight.dequantize() if original is None else original.detach()


def test_heads_are_written_in_fp8_where_that_is_asked(tmp_path: Path) -> None:
    """Serving engines take no FP8 heads; transformers and load_checkpoint do."""
    model = enable_fp8_gemm(llama())
    save_checkpoint(model, tmp_path / "dense")
    save_checkpoint(model, tmp_path / "fp8", fp8_heads=True)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    with torch.device("meta"):
        loaded = llama()
    load_checkpoint(loaded, tmp_path / "fp8")
    assert isinstance(loaded.lm_head, FP8Linear)
    assert torch.equal(loaded.lm_head.weight.dequantize(), model.lm_head.weight.dequantize())


def test_a_head_that_is_tied_is_written_once_and_dense(tmp_path: Path) -> None:
    model = llama(tied=True)
    enable_fp8_gemm(model)
    expected = model.lm_head.weight.dequantize()
    for name, asked in (("dense", False), ("asked", True)):
        save_checkpoint(model, tmp_path / name, fp8_heads=asked)
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            names = [key for key in file.keys() if "embed" in key or "lm_head" in key]  # noqa: SIM118
            assert names == ["model.embed_tokens.weight"]
            assert torch.equal(file.get_tensor(names[0]), expected)
    with torch.device("meta"):
        loaded = llama(tied=True)
    load_checkpoint(loaded, tmp_path / "dense")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


@pytest.mark.parametrize("storage", ["keep", "discard"])
def test_what_is_written_says_what_it_is(storage: str, tmp_path: Path) -> None:
    model = enable_fp8_gemm(llama(), options=FP8GemmOptions(fp16_weight_storage=storage))  # type: ignore[arg-type]
    model.save_pretrained(tmp_path, safe_serialization=True, token=None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["model_type"] == "llama"
    assert (tmp_path / "generation_config.json").is_file()
    assert same_weights(tmp_path, model)
    assert not hasattr(model.config, "quantization_config")


def test_copies_save_themselves(tmp_path: Path) -> None:
    model = enable_fp8_gemm(llama())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.mul_(2)
    for name, one in (("model", model), ("twin", twin), ("pickled", pickle.loads(pickle.dumps(twin)))):
        one.save_pretrained(tmp_path / name)
        assert same_weights(tmp_path / name, one)
    assert same_weights(tmp_path / "pickled", twin)
    assert not same_weights(tmp_path / "model", twin)
    other = enable_fp8_gemm(llama(), inplace=False)
    other.save_pretrained(tmp_path / "other")
    assert same_weights(tmp_path / "other", other)


def test_a_model_inside_a_model_and_one_that_was_loaded(tmp_path: Path) -> None:
    outer = nn.ModuleDict({"llm": llama(), "head": nn.Linear(4, 4)})
    enable_fp8_gemm(outer)
    outer["llm"].save_pretrained(tmp_path / "inner")
    assert same_weights(tmp_path / "inner", outer["llm"])
    with torch.device("meta"):
        loaded = llama()
    load_checkpoint(loaded, tmp_path / "inner")
    loaded.save_pretrained(tmp_path / "again")
    assert same_weights(tmp_path / "again", loaded)


def test_what_is_not_written_is_refused(tmp_path: Path) -> None:
    model = enable_fp8_gemm(llama())
    for refused in ({"push_to_hub": True}, {"state_dict": {"a": 1}}, {"variant": "fp8"}, {"safe_serialization": False}):
        with pytest.raises(UnsupportedError, match=r"does not support .*fp8gemm.save_checkpoint"):
            model.save_pretrained(tmp_path, **refused)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_undoing_gives_the_models_own_way_back(tmp_path: Path) -> None:
    model = llama()
    enable_fp8_gemm(model)
    disable_fp8_gemm(model)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    assert type(transformers.LlamaForCausalLM.from_pretrained(tmp_path).lm_head) is nn.Linear


@pytest.mark.parametrize("storage", ["keep", "discard"])
@pytest.mark.parametrize(
    ("base", "library", "method"),
    [("ModelMixin", "diffusers", "save_pretrained"), ("Module", "sentence_transformers", "save_torch_weights")],
)
def test_libraries_that_read_no_fp8_write_dense_values(base: str, library: str, method: str, storage: str) -> None:
    """By their own methods, which ask for the state dict; a head that is tied stays so."""
    written: dict[str, torch.Tensor] = {}

    def save(model: nn.Module, directory: str, **others: object) -> None:
        written.update(model.state_dict())

    mixin = type(base, (nn.Module,), {method: save, "__module__": f"{library}.models"})

    class Transformer(mixin):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.norm = nn.Linear(16, 32), nn.LayerNorm(32)
            self.head = nn.Linear(16, 32, bias=False)
            self.head.weight = self.proj.weight

    dense = Transformer()
    model = enable_fp8_gemm(copy.deepcopy(dense), options=FP8GemmOptions(fp16_weight_storage=storage))  # type: ignore[arg-type]
    getattr(model, method)("folder")
    assert written.keys() == dense.state_dict().keys()
    expected = dense.proj.weight if storage == "keep" else model.proj.weight.dequantize()
    assert torch.equal(written["proj.weight"], expected)
    assert written["proj.weight"].data_ptr() == written["head.weight"].data_ptr()
    assert model.state_dict()["proj.weight"].dtype == torch.float8_e4m3fn
    disable_fp8_gemm(model)
    assert method not in vars(model)


def test_a_dense_part_keeps_its_own_way() -> None:
    outer = nn.ModuleDict({"llm": llama(), "head": nn.Linear(4, 4)})
    enable_fp8_gemm(outer, module_filter="head")
    assert isinstance(outer["head"], FP8Linear)
    assert "save_pretrained" not in vars(outer["llm"])


def test_generating() -> None:
    model = enable_fp8_gemm(llama())
    found = model.generate(TOKENS, max_new_tokens=3, do_sample=False)
    logits = model(found[:, :-1]).logits
    assert found.shape == (1, 14)
    assert found[0, -1] == logits[0, -1].argmax()


@pytest.mark.parametrize(("storage", "kept"), [("keep", True), ("discard", False)])
def test_the_memory_footprint_is_what_is_stored(storage: str, kept: bool) -> None:
    model = llama()
    count, before = model.num_parameters(), model.get_memory_footprint()
    enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage=storage))  # type: ignore[arg-type]
    layers = [module for module in model.modules() if isinstance(module, FP8Linear)]
    numel, rows = (sum(layer.weight.shape[0] * of(layer) for layer in layers) for of in (lambda q: q.in_features, _one))
    fp8 = numel + 4 * rows  # a scale for each row
    expected = before - 4 * numel + fp8 + (4 * numel if kept else 0)
    for one in (model, copy.deepcopy(model)):
        assert one.get_memory_footprint() == expected
        buffers = sum(buffer.nbytes for buffer in one.buffers())
        assert one.get_memory_footprint(return_buffers=False) == expected - buffers
    assert model.num_parameters() == count
    disable_fp8_gemm(model)
    assert model.get_memory_footprint() == before


def _one(layer: nn.Linear) -> int:
    return 1


def test_initializing_a_patched_model_again_leaves_what_was_loaded(tmp_path: Path) -> None:
    """As transformers does for a head that a checkpoint lacks."""
    llama().save_pretrained(tmp_path)
    model = enable_fp8_gemm(transformers.LlamaForCausalLM.from_pretrained(tmp_path))
    expected = model(TOKENS).logits
    model.initialize_weights()
    assert torch.equal(model(TOKENS).logits, expected)
