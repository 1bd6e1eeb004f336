"""Recipes: a scheme or the original for each layer, as JSON."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fp8gemm import (
    FP8GemmOptions,
    FP8Linear,
    Granularity,
    Recipe,
    Scheme,
    UnsupportedError,
    disable_fp8_gemm,
    enable_fp8_gemm,
    plan,
    report,
)


class Model(nn.Module):
    """A body, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(32, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.down(self.up(self.table(ids)).relu())))


IDS = torch.arange(8)
MIXED = Recipe(layers={"up": "block", "head": "original", "down": "weight_only"})


def schemes(model: nn.Module) -> dict[str, str]:
    return {row.name: row.scheme or row.reason for row in report(model).rows}


WANTED = {
    "head": "kept by the recipe",
    "up": "weight 128x128, activation 1x128",
    "down": "weight row, activation kept",
}


@pytest.mark.parametrize("form", ["recipe", "dict", "path", "string"])
@torch.no_grad()
def test_each_layer_gets_what_the_recipe_says(form: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    MIXED.save(file)
    given = {"recipe": MIXED, "dict": MIXED.to_dict(), "path": file, "string": str(file)}[form]
    model = Model()
    assert {step.name: step.converts for step in plan(model, options=given)} == {
        "head": False,
        "up": True,
        "down": True,
    }
    enable_fp8_gemm(model, options=given)
    assert schemes(model) == WANTED
    assert model.head.weight is model.table.weight
    expected = copy.deepcopy(Model())
    for name, scheme in (("up", "block"), ("down", "weight_only")):
        enable_fp8_gemm(expected, options=FP8GemmOptions(scheme=scheme), module_filter=name)
    assert torch.equal(model(IDS), expected(IDS))
    disable_fp8_gemm(model)
    assert report(model).rows == ()


def test_a_copy_leaves_the_model() -> None:
    model = Model()
    converted = enable_fp8_gemm(model, options=MIXED, inplace=False)
    assert schemes(converted) == WANTED
    assert type(model.up) is nn.Linear
    assert report(model).rows == ()


def test_what_is_not_named_follows_the_options() -> None:
    recipe = Recipe(options=FP8GemmOptions(scheme="tensor", fp16_weight_storage="keep"), layers={"down": "row"})
    model = enable_fp8_gemm(Model(), options=recipe)
    assert schemes(model) == {
        "up": "weight tensor, activation tensor",
        "down": "weight row, activation row",
        "head": "weight tensor, activation tensor",
    }
    assert model.up.original_weight is not None


def test_a_filter_selects_from_what_the_recipe_plans() -> None:
    model = enable_fp8_gemm(Model(), options=MIXED, module_filter="!down")
    assert schemes(model) == {**WANTED, "down": "module_filter: !down"}


def test_tied_weights() -> None:
    assert schemes(enable_fp8_gemm(Model(), options=Recipe(layers={"table": "original"})))["head"] == WANTED["head"]
    with pytest.raises(ValueError, match="treats one tensor in several ways: table 'row', head 'original' are tied"):
        enable_fp8_gemm(Model(), options=Recipe(layers={"table": "row", "head": "original"}))


def test_embedding_tables_by_name() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(32, 16), "b": nn.Embedding(32, 16), "c": nn.Linear(16, 16)})
    with pytest.raises(ValueError, match="'block' for 'a', which cannot be converted: an embedding table has one"):
        enable_fp8_gemm(model, options=Recipe(layers={"a": "block"}))
    enable_fp8_gemm(model, options=Recipe(layers={"a": "row", "b": "original"}))
    assert schemes(model) == {
        "a": "weight row, activation row",
        "b": "kept by the recipe",
        "c": "weight row, activation row",
    }


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 32))
        self.down_proj = nn.Parameter(torch.randn(4, 32, 32))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(32, 4), Experts()


def test_experts_and_routers() -> None:
    recipe = Recipe(layers={"experts.gate_up_proj": "tensor", "experts.down_proj": "original", "gate": "weight_only"})
    assert schemes(enable_fp8_gemm(Mixture(), options=recipe)) == {
        "experts.gate_up_proj": "weight 32xall, activation tensor",
        "experts.down_proj": "kept by the recipe",
        "gate": "weight row, activation kept",
    }
    reason = schemes(enable_fp8_gemm(Mixture(), options=Recipe(layers={"experts.down_proj": "original"})))["gate"]
    assert reason.startswith("it is the router of")


def test_a_model_that_is_a_layer() -> None:
    assert schemes(enable_fp8_gemm(nn.Linear(64, 64), options=Recipe(layers={"": "block"}))) == {
        "(the model itself)": "weight 128x128, activation 1x128"
    }


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"upp": "row"}, r"the recipe names 'upp', which the model has not; it has 'up' and 3 more"),
        ({"upp": "original"}, r"the recipe names 'upp'"),
        ({"zzz": "row"}, r"it has 'head', 'table', 'up', 'down'"),
        ({"norm": "row"}, r"'row' for 'norm', which cannot be converted: it is not a factor of a matrix product"),
        ({"up": "original", "down": "original", "head": "original"}, r"all kept \(head: kept by the recipe"),
    ],
)
def test_layers_that_cannot_be_as_the_recipe_says(layers, message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=message):
        enable_fp8_gemm(model, options=Recipe(layers=layers))
    assert type(model.up) is nn.Linear
    with pytest.warns(UserWarning, match=message):
        enable_fp8_gemm(model, options=Recipe(options=FP8GemmOptions(strict=False), layers=layers))


def test_a_norm_may_be_named_as_original() -> None:
    assert len(report(enable_fp8_gemm(Model(), options=Recipe(layers={"norm": "original"}))).converted) == 3


def test_a_reason_of_the_layer_itself_is_told() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)))
    with pytest.raises(ValueError, match="'row' for '1', which cannot be converted: its weight is not a parameter"):
        enable_fp8_gemm(model, options=Recipe(layers={"1": "row"}))
    options = FP8GemmOptions(engine="vllm")
    with pytest.raises(UnsupportedError, match=r"0: engine 'vllm' cannot multiply \[64, 64\] in .*weight 128x128"):
        enable_fp8_gemm(model, options=Recipe(options=options, layers={"0": "block"}))


def test_layers_that_are_on_fp8_already() -> None:
    model = enable_fp8_gemm(Model(), module_filter="up")
    enable_fp8_gemm(model, options=Recipe(layers={"up": "row", "down": "block"}))
    assert schemes(model)["down"] == "weight 128x128, activation 1x128"
    for treatment in ("block", "weight_only", "original"):
        with pytest.raises(
            ValueError, match=f"the recipe says '{treatment}' for 'up', which is on FP8 already: weight"
        ):
            enable_fp8_gemm(model, options=Recipe(layers={"up": treatment}))


@torch.no_grad()
def test_the_first_call_follows_the_recipe() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterDict({"up": torch.randn(256, 64), "down": torch.randn(256, 64)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.weights["up"].T).relu() @ self.weights["down"]

    recipe = Recipe(layers={"weights.up": "block", "weights.down": "original"})
    model = enable_fp8_gemm(Bare(), options=recipe, example_inputs="first call")
    model(torch.randn(3, 64))
    assert schemes(model) == {"weights.up": WANTED["up"], "weights.down": WANTED["head"]}
    model = enable_fp8_gemm(Bare(), options=Recipe(layers={"up": "block"}), example_inputs="first call")
    with pytest.warns(UserWarning, match="the recipe names 'up'"):
        model(torch.randn(3, 64))


MX_LIKE = Scheme(weight=Granularity(1, 32), activation=None, scale_format="ue8m0")


@pytest.mark.parametrize(
    "options",
    [
        FP8GemmOptions(),
        FP8GemmOptions(weight_dtype=torch.float8_e5m2, cast_inputs=False),
        FP8GemmOptions(scheme=MX_LIKE),
    ],
)
def test_files_hold_everything(options: FP8GemmOptions, tmp_path: Path) -> None:
    recipe = replace(MIXED, options=options)
    recipe.save(tmp_path / "a.json")
    assert Recipe.load(tmp_path / "a.json") == recipe
    text = json.loads((tmp_path / "a.json").read_text())
    assert text["layers"] == dict(MIXED.layers)
    assert text["options"]["weight_dtype"] == str(options.weight_dtype).removeprefix("torch.")
    assert Recipe.from_dict({}) == Recipe()


def test_a_generator_is_not_written() -> None:
    recipe = Recipe(options=FP8GemmOptions(generator=torch.Generator()))
    with pytest.raises(ValueError, match=r"options\.generator cannot be written"):
        recipe.to_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "not a recipe: Expecting value"),
        ("[]", "expected an object with options and layers, found list"),
        ('{"layer": {}}', "unknown entry 'layer'; known are version, options and layers"),
        ('{"version": 2}', "version must be 1, found 2"),
        ('{"version": true}', "version must be 1, found True"),
        ('{"layers": ["up"]}', "layers must map names of layers to treatments, found list"),
        (
            '{"layers": {"up": "mx"}}',
            "layers: 'up' must be one of original, row, tensor, block, weight_only, found 'mx'",
        ),
        ('{"layers": {"up": ["row"]}}', r"layers: 'up' must be one of .*, found \['row'\]"),
        ('{"layers": {"up": "row", "up": "block"}}', "not a recipe: 'up' is given twice"),
        ('{"options": []}', "options must be an object, found list"),
        ('{"options": {"schema": "row"}}', "options: unknown entry 'schema'; known are cast_inputs"),
        ('{"options": {"generator": 1}}', "options: unknown entry 'generator'"),
        ('{"options": {"strict": 1}}', "options: strict must be of type bool, found 1"),
        ('{"options": {"engine": null}}', "options: engine must be of type str, found None"),
        ('{"options": {"scheme": "mx"}}', "options: scheme must be a Scheme or one of row"),
        ('{"options": {"scheme": {"weight": [1, null]}}}', "options: scheme needs weight and activation, found weight"),
        ('{"options": {"scheme": {"kind": 1}}}', "options: scheme: unknown entry 'kind'"),
        ('{"options": {"scheme": {"weight": [1, "x"], "activation": null}}}', r"a granularity is \[rows, columns\]"),
        (
            '{"options": {"scheme": {"weight": [0, 1], "activation": null}}}',
            "Granularity.rows must be None or at least",
        ),
        ('{"options": {"scheme": {"weight": [1, 1], "activation": null, "static": 1}}}', "static is true or false"),
        ('{"options": {"weight_dtype": "float8"}}', "weight_dtype must be the name of a dtype, such as"),
        ('{"options": {"weight_dtype": "float32"}}', "weight_dtype must be one of torch.float8_e4m3fn"),
    ],
)
def test_files_that_are_no_recipes(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"bad.json: {message}|bad.json: options: .*{message}"):
        enable_fp8_gemm(Model(), options=file)


def test_what_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.json: not a recipe: .*No such file"):
        Recipe.load(tmp_path / "no.json")
    with pytest.raises(ValueError, match="options must be FP8GemmOptions, found dict"):
        Recipe(options={})
    with pytest.raises(ValueError, match="the name of a layer must be a string, found 3"):
        Recipe(layers={3: "row"})
    assert isinstance(enable_fp8_gemm(Model(), options=None).up, FP8Linear)
