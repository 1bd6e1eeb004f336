"""``fp8gemm measure``: models of transformers, with texts or tensors from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from fp8gemm import FP8GemmOptions, Recipe, measure
from fp8gemm.cli import main

WORDS = ["[UNK]", "one", "two", "three", "four", "five"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model with random weights, and a tokenizer of few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    where = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(where)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(where)
    return where


TEXT = "one two three\n\nfour five\n two one three \nfive four three two one\n"


def test_lines_of_a_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of one length are one batch, so there is no padding; a longer one is cut."""
    (tmp_path / "data.txt").write_text(TEXT)
    arguments = ["measure", str(folder), "--data", str(tmp_path / "data.txt"), "--max-tokens", "4", "--json"]
    assert main([*arguments, "--html", str(tmp_path / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = [torch.tensor([[1, 2, 3], [2, 1, 3]]), torch.tensor([[4, 5]]), torch.tensor([[5, 4, 3, 2]])]
    inputs = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    expected = measure(model, inputs, options=FP8GemmOptions(engine="reference"))
    assert found == json.loads(expected.to_json())
    assert expected.output.tokens == 12
    assert {layer.depth for layer in expected.layers} == {0, 1, None}
    assert (tmp_path / "page.html").read_text() == expected.to_html()


def test_tensors_of_a_file_and_a_recipe(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"input_ids": torch.tensor([[1, 2, 3, 4]])}, tmp_path / "inputs.safetensors")
    Recipe(options=FP8GemmOptions(scheme="tensor"), layers={"lm_head": "original"}).save(tmp_path / "recipe.json")
    arguments = ["measure", str(folder), "--data", str(tmp_path / "inputs.safetensors"), "--filter", "*.mlp.*"]
    assert main([*arguments[:4], "--recipe", str(tmp_path / "recipe.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kept"] == {"lm_head": "kept by the recipe"}
    assert {layer["scheme"] for layer in found["layers"]} == {"weight tensor, activation tensor"}
    assert main([*arguments, "--engine", "cpu", "--scheme", "block"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("weight 128x128, activation kept on cpu\n")
    assert text.count("_proj") == 2 * 3


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.txt", None, "absent.txt: neither a text file in UTF-8 nor a .safetensors file"),
        ("blank.txt", b" \n\n", "blank.txt has no text"),
        ("bytes.txt", b"\xff\xfe\x00", "neither a text file in UTF-8"),
        ("broken.safetensors", b"no", "broken.safetensors: not a safetensors file"),
        ("absent.safetensors", None, "absent.safetensors: not a safetensors file"),
    ],
)
def test_data_that_cannot_be_read(
    name: str, content: bytes | None, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["measure", str(folder), "--data", str(tmp_path / name)]) == 1
    assert said in capsys.readouterr().err


def test_models_that_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x": torch.ones(1, 4)}, tmp_path / "x.safetensors")
    (tmp_path / "x.txt").write_text("one")
    save_file({}, tmp_path / "nothing.safetensors")
    for data, said in (
        ("x.safetensors", "transformers cannot load a model from it: "),
        ("x.txt", "transformers finds no tokenizer there: "),
        ("nothing.safetensors", "nothing.safetensors has no tensors: name each as the argument"),
    ):
        assert main(["measure", str(tmp_path), "--data", str(tmp_path / data), "--offline"]) == 1
        assert said in capsys.readouterr().err
