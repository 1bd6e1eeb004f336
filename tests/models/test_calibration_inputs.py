"""``enable_fp8_gemm(..., calibration_inputs)``: what weights are given, and how scales and codes follow from it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp8gemm import TENSOR, FP8GemmOptions, FP8Linear, Recipe, enable_fp8_gemm, measure, report
from fp8gemm.models import moments
from fp8gemm.models.batches import batches
from fp8gemm.models.inputs import run
from fp8gemm.numerics import search_scale
from fp8gemm.weights.geometry import Layout

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
STACK = (4, 24, 16)  # experts, N, K
Use = Callable[[torch.Tensor, torch.Tensor], object]


class Product(nn.Module):
    """A parameter, and what is done with it."""

    def __init__(self, shape: tuple[int, ...], use: Use) -> None:
        super().__init__()
        self.w, self.use = nn.Parameter(torch.randn(shape)), use

    def forward(self, x: torch.Tensor) -> object:
        return self.use(x, self.w)


def given(shape: tuple[int, ...], layout: Layout, use: Use, x: torch.Tensor, *, fp8: bool) -> dict[int, torch.Tensor]:
    """The sums of squares ``[K]`` that a weight was noted to be given, by expert."""
    model: nn.Module = Product(shape, use)
    if fp8:
        from fp8gemm.weights.convert import convert

        convert(model, "w", FP8GemmOptions(), layout=layout)
    found: dict[int, torch.Tensor] = {}

    def note(name: str, seen) -> None:
        squares = found.setdefault(seen.expert, torch.zeros(layout.shape[-1]))
        squares[seen.first_column :][: seen.x.shape[1]] += seen.x.float().square().sum(0)

    run(model, batches(x), {"w": (model.w, layout)}, note)
    return found


def autocast(use: Use) -> Use:
    def cast(x: torch.Tensor, w: torch.Tensor) -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return use(x, w)

    return cast


MATRIX = {
    "linear": lambda x, w: F.linear(x, w),
    "linear with a bias": lambda x, w: F.linear(x[None], w, torch.zeros(24)),
    "matmul": lambda x, w: x @ w.T,
    "the other way round": lambda x, w: w @ x.T,
    "einsum": lambda x, w: torch.einsum("tk,nk->tn", x, w),
    "a batch": lambda x, w: torch.bmm(x[None], w.T[None]),
    "a batch with one matrix": lambda x, w: torch.matmul(x.view(5, 1, 16), w.T.expand(5, 16, 24)),
    "vectors": lambda x, w: [torch.mv(w, row) for row in x],
    "addmm": lambda x, w: torch.addmm(torch.zeros(24), x, w.t()),
    "into out": lambda x, w: torch.mm(x, w.t(), out=torch.empty(5, 24)),
    "in place": lambda x, w: [torch.zeros(24).addmv_(w, row) for row in x],
    "rows": lambda x, w: F.linear(x, w[8:16]),
    "columns": lambda x, w: (F.linear(x[:, :8], w[:, :8]), F.linear(x[:, 8:], w[:, 8:])),
    "a convolution": lambda x, w: F.conv1d(x.t()[None], w[:, :, None]),
}


@pytest.mark.parametrize("fp8", [False, True], ids=["dense", "fp8"])
@pytest.mark.parametrize("use", MATRIX.values(), ids=MATRIX)
def test_what_products_with_a_matrix_are_given(use: Use, fp8: bool) -> None:
    found = given((24, 16), Layout.of((24, 16)), use, X, fp8=fp8)
    assert found.keys() == {0}
    torch.testing.assert_close(found[0], X.square().sum(0))


@pytest.mark.parametrize("fp8", [False, True], ids=["dense", "fp8"])
def test_autocast_and_transposed_weights(fp8: bool) -> None:
    found = given((16, 24), Layout.of((16, 24), turned=True), lambda x, w: x @ w, X, fp8=fp8)
    torch.testing.assert_close(found[0], X.square().sum(0))
    found = given((24, 16), Layout.of((24, 16)), autocast(lambda x, w: F.linear(x, w)), X, fp8=fp8)
    torch.testing.assert_close(found[0], X.bfloat16().float().square().sum(0))


def test_uses_over_the_other_dimension_are_not_noted() -> None:
    """A head that is tied to an embedding is multiplied over K; gradients, and x @ w, over N."""
    square = Layout.of((16, 16))
    assert given((16, 16), square, lambda x, w: x @ w, X, fp8=False) == {}
    assert given((16, 16), square, lambda x, w: x + w.sum(), X, fp8=False) == {}


BY_EXPERT = {
    "one by one": lambda x, w: [F.linear(x[expert : expert + 2], w[expert]) for expert in range(4)],
    "a batch": lambda x, w: torch.bmm(torch.stack([x[e : e + 2] for e in range(4)]), w.transpose(1, 2)),
    "einsum": lambda x, w: torch.einsum("etk,enk->etn", torch.stack([x[e : e + 2] for e in range(4)]), w),
}


@pytest.mark.parametrize("fp8", [False, True], ids=["dense", "fp8"])
@pytest.mark.parametrize("use", BY_EXPERT.values(), ids=BY_EXPERT)
def test_what_experts_are_given(use: Use, fp8: bool) -> None:
    found = given(STACK, Layout.of(STACK), use, X, fp8=fp8)
    assert found.keys() == set(range(4))
    for expert in range(4):
        torch.testing.assert_close(found[expert], X[expert : expert + 2].square().sum(0))


def test_what_a_grouped_product_is_given() -> None:
    ends, x = torch.tensor([2, 2, 3, 5], dtype=torch.int32), X.bfloat16()
    use = autocast(lambda x, w: torch._grouped_mm(x.bfloat16(), w.bfloat16().transpose(1, 2), ends))
    found = given(STACK, Layout.of(STACK), use, X, fp8=False)
    assert {expert for expert in found if found[expert].any()} == {0, 2, 3}
    torch.testing.assert_close(found[3], x[3:5].float().square().sum(0))


class Model(nn.Module):
    """A tied head, attention, and a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.spare = nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.table(ids)))


IDS = torch.arange(64).view(4, 16) % 40
HELD_OUT = torch.arange(64).flip(0).view(4, 16) % 37


def patched(search: str, inputs: object = IDS, inplace: bool = False, **options: object) -> nn.Module:
    chosen = FP8GemmOptions(weight_search=search, **options)  # type: ignore[arg-type]
    return enable_fp8_gemm(Model().eval(), options=chosen, calibration_inputs=inputs, inplace=inplace)


def scales(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith("_scale")}


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, others = a.state_dict(), b.state_dict()
    return all(mine[key].float().equal(others[key].float()) for key in mine)


def test_scales_are_weighted_by_what_each_layer_is_given() -> None:
    model = Model().eval()
    seen: list[torch.Tensor] = []
    model.layer.linear2.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    training = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    dense = copy.deepcopy(model.layer.linear2.weight)
    enable_fp8_gemm(model, options=FP8GemmOptions(weight_search="scales"), calibration_inputs=[IDS, IDS[:1]])
    assert torch.get_rng_state().equal(state)
    assert [module.training for module in model.modules()] == training
    moments = torch.cat([x.flatten(0, 1) for x in seen]).square().mean(0)
    assert model.layer.linear2.scaled().scale.equal(
        search_scale(dense, model.layer.linear2.scheme.weight, importance=moments)
    )
    rows = {row.name: row.search for row in report(model).rows}
    assert rows == {
        "head": "scales, weighted by 80 tokens",
        "layer.self_attn.in_proj_weight": "scales, weighted by 80 tokens",
        "layer.self_attn.out_proj": "scales, weighted by 80 tokens",
        "layer.linear1": "scales, weighted by 80 tokens",
        "layer.linear2": "scales, weighted by 80 tokens",
        "spare": "scales, unweighted: no product with it was seen",
    }
    assert "weight search" in str(report(model)).splitlines()[0]
    assert "weight search" not in str(report(enable_fp8_gemm(Model())))


def error(model: nn.Module, ids: torch.Tensor) -> float:
    dense = Model().eval()(ids)
    return ((model(ids) - dense).norm() / dense.norm()).item()


@torch.no_grad()
def test_better_numbers_at_the_same_bytes() -> None:
    plain = enable_fp8_gemm(Model().eval())
    for search in ("scales", "rounding"):
        found = patched(search)
        assert report(found).bytes_after == report(plain).bytes_after
        assert error(found, HELD_OUT) < error(plain, HELD_OUT)
    assert not same(patched("rounding"), patched("scales"))


@pytest.mark.parametrize("search", ["scales", "rounding"])
@pytest.mark.parametrize("storage", ["discard", "keep", "cpu_offload"])
def test_every_way_of_patching_gives_the_same_bytes(search: str, storage: str) -> None:
    expected = patched(search)
    assert same(patched(search, inplace=True, fp16_weight_storage=storage), expected)
    found = patched(search, fp16_weight_storage=storage)
    assert same(found, expected)
    assert same(copy.deepcopy(found), expected)
    for module in found.modules():
        if isinstance(module, FP8Linear):
            module.invalidate_weight_cache()
    assert same(found, expected)
    if search == "scales":
        lazy = patched(search, fp16_weight_storage=storage, materialize_fp8_on_wrap=False)
        assert [row.engine for row in report(lazy).rows] == [""] * 6
        lazy(IDS)
        assert same(lazy, expected)


def test_tied_embeddings_are_not_rounded_for_the_sake_of_the_head() -> None:
    found, scaled, plain = patched("rounding"), patched("scales"), enable_fp8_gemm(Model().eval())
    rows = {row.name: row.search for row in report(found).rows}
    assert rows["head"] == "scales, weighted by 64 tokens: its rows are also looked up"
    assert found.head.scaled().data.float().equal(scaled.head.scaled().data.float())
    off = [(model.table(IDS) - Model().table(IDS)).square().sum() for model in (found, plain)]
    assert off[0] < 1.1 * off[1]


def test_in_groups_rounding_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, passes = patched("rounding"), []
    monkeypatch.setattr(moments, "_BYTES_AT_ONCE", 1)
    monkeypatch.setattr(moments, "run", lambda *args: passes.append(len(args[2])) or run(*args))
    assert same(patched("rounding"), expected)
    assert passes == [1] * 6


def test_recipes_choose_the_scheme_of_each_layer() -> None:
    options = FP8GemmOptions(weight_search="rounding")
    recipe = Recipe(options=options, layers={"layer.linear1": "tensor", "layer.linear2": "original", "spare": "block"})
    model = enable_fp8_gemm(Model().eval(), options=recipe, calibration_inputs=IDS)
    assert model.layer.linear1.scheme.weight == TENSOR
    tensor = patched("rounding", scheme="tensor")
    assert model.layer.linear1.scaled().data.float().equal(tensor.layer.linear1.scaled().data.float())
    assert {row.name: row.search for row in report(model).rows}["layer.linear1"] == "rounding, 64 tokens"


@pytest.mark.parametrize("search", ["scales", "rounding"])
@torch.no_grad()
def test_what_is_written_later_is_rounded_to_nearest(search: str) -> None:
    discarding, keeping = patched(search), patched(search, fp16_weight_storage="keep")
    for model in (discarding, keeping):
        before = report(model).rows
        model.spare.weight[3] = 0.5
        model.layer.linear1.weight.mul_(2)
        model(IDS)
        model.spare(torch.ones(32))
        after = {row.name: row.search for row in report(model).rows}
        assert after["head"] == next(row.search for row in before if row.name == "head")
    again = ", to nearest since it was written to"
    texts = [{row.name: row.search for row in report(model).rows} for model in (discarding, keeping)]
    assert all(texts[0][name].endswith(again) for name in ("spare", "layer.linear1"))
    assert texts[1]["layer.linear1"].endswith(again) == (search == "rounding")  # scales are searched for again
    assert discarding.spare.weight[3].unique().tolist() == [0.5]


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_search must be one of none, scales, rounding, found 'best'"):
        FP8GemmOptions(weight_search="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="calibration_inputs have no effect with weight_search='none'"):
        patched("none")
    with pytest.raises(ValueError, match="weight_search='rounding' needs calibration_inputs"):
        patched("rounding", inputs=None)
    with pytest.raises(ValueError, match="quantizes while patching, when it has the inputs"):
        patched("rounding", materialize_fp8_on_wrap=False)
    with pytest.raises(ValueError, match="exclude each other"):
        enable_fp8_gemm(
            Model(),
            options=FP8GemmOptions(weight_search="scales"),
            example_inputs="first call",
            calibration_inputs=IDS,
        )
    with pytest.raises(ValueError, match="calibration_inputs has no batches"):
        patched("scales", inputs=[])
    with pytest.raises(ValueError, match="needs calibration_inputs: use enable_fp8_gemm"):
        FP8Linear.from_linear(nn.Linear(4, 4), FP8GemmOptions(weight_search="rounding"))
    with torch.device("meta"):
        empty = Model()
    with pytest.raises(ValueError, match=r"table.weight is on meta|head.weight is on meta"):
        enable_fp8_gemm(empty, options=FP8GemmOptions(weight_search="scales"), calibration_inputs=IDS)


@pytest.mark.parametrize("search", ["scales", "rounding"])
def test_inputs_that_are_not_finite_name_the_layer_and_change_nothing(search: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).train()
    x = torch.ones(2, 8)
    x[1, 3] = torch.nan
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"^0\.weight: the calibration inputs give it NaN or infinite activations"):
        enable_fp8_gemm(model, options=FP8GemmOptions(weight_search=search), calibration_inputs=[x])  # type: ignore[arg-type]
    assert [type(module) for module in model.modules()] == kinds
    assert all(module.training for module in model.modules())


def test_without_calibration_inputs_scales_are_unweighted() -> None:
    model = patched("scales", inputs=None)
    assert {row.search for row in report(model).rows} == {"scales, unweighted"}
    dense = Model().spare.weight.detach()
    assert model.spare.scaled().scale.equal(search_scale(dense, model.spare.scheme.weight))


@pytest.mark.parametrize("search", ["scales", "rounding"])
def test_measured_layers_are_quantized_as_they_would_be_converted(search: str) -> None:
    options = FP8GemmOptions(weight_search=search, scheme="weight_only")  # type: ignore[arg-type]
    found = measure(Model().eval(), [IDS], options=options)
    plain = measure(Model().eval(), [IDS], options=FP8GemmOptions(scheme="weight_only"))
    kept = measure(patched(search, scheme="weight_only", fp16_weight_storage="keep"), [IDS])
    assert [layer.sqnr for layer in found.layers[:5]] == [layer.sqnr for layer in kept.layers[:5]]  # spare has none
    gains = {a.name: a.sqnr - b.sqnr for a, b in zip(found.layers, plain.layers, strict=True) if "layer" in a.name}
    assert min(gains.values()) > (2 if search == "rounding" else -0.2)
