"""``fp8gemm tune``: a recipe in a file, from a model of transformers and texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from fp8gemm import FP8GemmOptions, Recipe, enable_fp8_gemm, report, tune
from fp8gemm.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(where)
    save_file({"input_ids": torch.arange(12).view(2, 6)}, where / "data.safetensors")
    return where


def test_a_recipe_is_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tune", str(folder), "--data", str(folder / "data.safetensors"), "--output", str(tmp_path / "a.json")]
    more = ["--candidates", "row,original", "--filter", "!pooler.*", "--sensitivity", "outputs"]
    assert main([*arguments, "--budget", "1e-7", *more, "--html", str(tmp_path / "a.html"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = transformers.AutoModel.from_pretrained(folder)
    expected = tune(
        model,
        {"input_ids": torch.arange(12).view(2, 6)},
        budget=1e-7,
        options=FP8GemmOptions(engine="reference"),
        candidates=("row", "original"),
        module_filter="!pooler.*",
        sensitivity="outputs",
    )
    recipe = Recipe.load(tmp_path / "a.json")
    assert recipe.layers == expected.recipe.layers
    assert recipe.layers["pooler.dense"] == "original"
    assert 1 < len(recipe.layers) < 12
    assert recipe.options.engine == "auto"
    assert found["recipe"] == recipe.to_dict()
    assert found["value"] == expected.value <= 1e-7
    assert (tmp_path / "a.html").read_text().count("<circle") == len(expected.points)
    assert len(report(enable_fp8_gemm(model, options=tmp_path / "a.json")).kept) == len(recipe.layers)


def test_a_budget_that_cannot_be_met(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tune", str(folder), "--data", str(folder / "data.safetensors"), "--output", str(tmp_path / "a.json")]
    assert main([*arguments, "--budget", "90", "--metric", "psnr", "--candidates", "row"]) == 1
    assert "fp8gemm tune: no variant meets the budget of 90 dB: the best of 1 has a PSNR of" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()
