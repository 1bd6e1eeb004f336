"""Switching converted layers between FP8, weight-only and the originals: exactly, and back."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_pause import IDS, Model
from torch import nn

from fp8gemm import (
    ENGINES,
    SCHEMES,
    FP8GemmOptions,
    FP8Linear,
    FP8Weight,
    Machine,
    MatmulSpec,
    UnsupportedError,
    disable_fp8_gemm,
    enable_fp8_gemm,
    fuse_gated,
    fuse_siblings,
    paused,
    register_engine,
    report,
    save_checkpoint,
    set_precision,
)
from fp8gemm.engines.base import PackedWeight
from fp8gemm.engines.reference import ReferenceEngine

QUANTIZING = [name for name, scheme in SCHEMES.items() if scheme.activation is not None]


@pytest.fixture(autouse=True)
def _composed_attention() -> Iterator[None]:
    """torch's fused attention adds in another order than its steps, which FP8 weights take at every precision."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def options(scheme: str = "row", storage: str = "keep", engine: str = "reference") -> FP8GemmOptions:
    return FP8GemmOptions(scheme=scheme, engine=engine, fp16_weight_storage=storage, embeddings=True)


def patched(scheme: str = "row", storage: str = "keep", engine: str = "reference") -> tuple[nn.Module, nn.Module]:
    """A patched model whose engine quantizes activations, and the dense one."""
    torch.manual_seed(0)
    dense = Model().eval()
    model = copy.deepcopy(dense)
    return enable_fp8_gemm(model, options=options(scheme, storage, engine), module_filter=lambda *_: True), dense


def twin_of(dense: nn.Module, scheme: str) -> nn.Module:
    """The model as it is patched with the weight-only variant of a scheme: with the same bytes."""
    weight_only = replace(options(), scheme=SCHEMES[scheme].weight_only())
    return enable_fp8_gemm(copy.deepcopy(dense), options=weight_only, module_filter=lambda *_: True)


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("scheme", QUANTIZING)
@torch.no_grad()
def test_each_precision_is_exact_and_so_is_the_way_back(scheme: str, fused: bool) -> None:
    model, dense = patched(scheme)
    weight_only = twin_of(dense, scheme)
    if fused:
        for one in (model, weight_only):
            fuse_siblings(one)
            fuse_gated(one)
    held = dict(model.named_parameters())
    fp8 = [model(IDS) for _ in range(4)][-1]
    expected = [weight_only(IDS) for _ in range(4)][-1]
    assert not fp8.equal(expected)
    for precision, wanted in (
        ("weight_only", expected),
        ("fp8", fp8),
        ("original", dense(IDS)),
        ("weight_only", expected),
        ("original", dense(IDS)),
        ("fp8", fp8),
    ):
        names = set_precision(model, "*", precision)
        assert len(names) == len(report(model).rows) == 8
        assert {row.precision for row in report(model).rows} == {precision}
        for _ in range(4):  # the general path, and bound calls
            assert model(IDS).equal(wanted), precision
        assert all(parameter is held[name] for name, parameter in model.named_parameters())
    assert {row.dequantizations for row in report(model).rows} <= {0, 4 * 9, 4 * 8} or fused


@pytest.mark.parametrize("gradients", [False, True])
def test_gradients_and_training_mode(gradients: bool) -> None:
    model, dense = patched()
    set_precision(model, "*", "original")
    model.train(), dense.train()
    with torch.set_grad_enabled(gradients):
        assert model(IDS).equal(dense(IDS))
    if gradients:
        model(IDS).square().sum().backward()
        dense(IDS).square().sum().backward()
        torch.testing.assert_close(model.gate_proj.bias.grad, dense.gate_proj.bias.grad)
        assert model.gate_proj.weight.grad is None


@torch.no_grad()
def test_casts_and_other_reads_of_the_weight_give_the_original() -> None:
    layer = nn.Linear(64, 32)
    dense = copy.deepcopy(layer)
    enable_fp8_gemm(layer, options=options())
    set_precision(layer, "*", "original")
    x = torch.randn(3, 64)
    for given in (x, x.double(), x.bfloat16()):
        assert layer(given).equal(F.linear(given.float(), dense.weight, dense.bias).to(given.dtype))
    w = layer.weight
    for read in (
        lambda w: w.clone(),
        lambda w: w.clone()[1:3],
        lambda w: w[1:3].clone(),
        lambda w: w.to(torch.bfloat16) @ x.bfloat16().T,
        lambda w: w.T.contiguous(),
        lambda w: torch.cat([w[:4], w[8:]]),
        lambda w: x @ w.T[:, 3:7],
        lambda w: F.pad(w, (0, 1)),
        lambda w: torch.einsum("mk,nk->nm", x, w),
        lambda w: w.norm(),
    ):
        assert (0 + read(w)).equal(0 + read(dense.weight))
    assert not w.dequantize().equal(dense.weight)  # what is asked for by its name
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).equal(dense(x))


@pytest.mark.parametrize("storage", ["discard", "keep", "cpu_offload"])
@torch.no_grad()
def test_a_static_scale_is_not_used_meanwhile_and_then_again(storage: str) -> None:
    scheme = replace(SCHEMES["tensor"], static=True)
    layer = nn.Linear(64, 32)
    weight = FP8Linear.from_linear(layer, options("tensor")).scaled()
    scale = torch.tensor(0.25)
    made = replace(options(storage=storage), scheme=scheme)
    model = nn.Sequential(FP8Linear.convert(copy.deepcopy(layer), made, weight=weight, input_scale=scale))
    bytes_only = replace(options(), scheme=scheme.weight_only())
    twin = FP8Linear.convert(copy.deepcopy(layer), bytes_only, weight=weight)
    x = torch.randn(5, 64)
    before = model(x)
    assert not before.equal(twin(x))
    set_precision(model, "0", "weight_only")
    assert all(model(x).equal(twin(x)) for _ in range(3))
    assert model[0].input_scale.equal(scale)
    assert "0.input_scale" in model.state_dict()
    set_precision(model, "0", "fp8")
    assert all(model(x).equal(before) for _ in range(3))


@torch.no_grad()
def test_writes_at_any_precision_are_quantized_once() -> None:
    values, x = torch.randn(32, 64), torch.randn(3, 64)
    expected = enable_fp8_gemm(nn.Linear(64, 32, bias=False), options=options())
    expected.weight.copy_(values)
    for precision in ("weight_only", "original"):
        layer = enable_fp8_gemm(nn.Linear(64, 32, bias=False), options=options())
        layer(x)
        set_precision(layer, "*", precision)
        layer.weight.copy_(values)
        if precision == "original":
            assert layer(x).equal(F.linear(x, values))
        set_precision(layer, "*", "fp8")
        assert layer(x).equal(expected(x))


def test_one_pattern_of_many() -> None:
    model, _ = patched()
    assert set_precision(model, ["*_proj", "!up_proj"], "weight_only") == (
        "gate_proj",
        "down_proj",
        "attention.out_proj",
    )
    assert set_precision(model, lambda name, _: name == "experts", "original") == ("experts",)
    assert set_precision(model, "embedding", "weight_only") == ("embedding = head",)
    found = {row.name: row.precision for row in report(model).rows}
    assert found["up_proj"] == "fp8"
    assert found["experts"] == "original"
    text = str(report(model))
    assert "reference, weight-only" in text
    assert "original weight" in text


@torch.no_grad()
def test_one_of_fused_siblings() -> None:
    block = nn.ModuleDict({name: nn.Linear(32, 16) for name in ("q_proj", "k_proj", "v_proj")})
    enable_fp8_gemm(block, options=options())
    fuse_siblings(block)
    x = torch.randn(4, 32)
    expected = [[layer(x) for layer in block.values()] for _ in range(3)][-1]
    set_precision(block, "q_proj", "weight_only")
    found = [[layer(x) for layer in block.values()] for _ in range(3)][-1]
    assert not found[0].equal(expected[0])
    torch.testing.assert_close(found[1:], expected[1:])
    set_precision(block, "q_proj", "fp8")
    again = [[layer(x) for layer in block.values()] for _ in range(3)][-1]
    assert all(a.equal(b) for a, b in zip(again, expected, strict=True))
    assert block["q_proj"].group is not None


def test_discarded_originals_are_refused_by_name_and_nothing_changes() -> None:
    model, _ = patched(storage="discard")
    with pytest.raises(ValueError, match="needs the originals, which are missing") as caught:
        set_precision(model, ["*_proj", "head"], "original")
    text = str(caught.value)
    assert "gate_proj: its original was not kept: it was converted with fp16_weight_storage='discard'" in text
    assert "fp16_weight_storage='keep' or 'cpu_offload'" in text
    assert "fp8gemm.paused(model)" in text
    assert {row.precision for row in report(model).rows} == {"fp8"}


def test_an_assigned_parameter_that_somebody_else_keeps_is_no_original() -> None:
    layer = enable_fp8_gemm(nn.Linear(8, 4), options=options(storage="discard"))
    mine = nn.Parameter(torch.randn(4, 8))
    layer.weight = mine
    with pytest.raises(ValueError, match="the model itself: its original was not kept"):
        set_precision(layer, "*", "original")


class Rounding(ReferenceEngine):
    """An engine that cannot leave activations unquantized."""

    name = "rounding"

    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        return ["quantizes activations always"] if spec.scheme.activation is None else []


@torch.no_grad()
def test_an_engine_that_must_quantize_is_refused_before_anything_changes() -> None:
    register_engine(Rounding())
    try:
        model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))
        enable_fp8_gemm(model, options=options(), module_filter="0")
        enable_fp8_gemm(model, options=options(engine="rounding"))
        x = torch.randn(3, 32)
        before = model(x)
        with pytest.raises(UnsupportedError, match="1 at precision 'weight_only': engine 'rounding' cannot"):
            set_precision(model, "*", "weight_only")
        assert [row.precision for row in report(model).rows] == ["fp8", "fp8"]
        assert model(x).equal(before)
        set_precision(model, "*", "original")
    finally:
        del ENGINES["rounding"]


class Binding(ReferenceEngine):
    """An engine that quantizes activations and binds calls."""

    name = "binding"
    traceable = False

    def bind(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def bound(x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x.reshape(-1, weight.k), weight, bias, out_dtype)
            return y.reshape(*x.shape[:-1], weight.n)

        return bound


@torch.no_grad()
def test_bound_calls_are_not_used_at_another_precision() -> None:
    register_engine(Binding())
    try:
        layer, x = nn.Linear(64, 32), torch.randn(4, 64)
        expected = {
            "fp8": enable_fp8_gemm(copy.deepcopy(layer), options=options())(x),
            "weight_only": enable_fp8_gemm(copy.deepcopy(layer), options=FP8GemmOptions(scheme="weight_only"))(x),
            "original": layer(x),
        }
        model = enable_fp8_gemm(copy.deepcopy(layer), options=options(engine="binding"))
        bias = model.bias.detach()
        graph = torch.compile(lambda x: F.linear(x, model.weight, bias), backend="aot_eager")
        for precision in ("fp8", "weight_only", "original", "fp8", "original", "weight_only", "fp8"):
            set_precision(model, "*", precision)
            for _ in range(4):
                for y in (model(x), F.linear(x, model.weight, bias), graph(x)):
                    torch.testing.assert_close(y, expected[precision])
        assert report(model).rows[0].kernels[0][0] == "binding"
    finally:
        del ENGINES["binding"]


def test_what_matches_nothing_lists_names() -> None:
    model, _ = patched()
    with pytest.raises(
        ValueError,
        match=r"pattern 'blocks\.\*' matches no converted layer; converted are experts, embedding = head, gate",
    ):
        set_precision(model, "blocks.*", "weight_only")
    with pytest.raises(ValueError, match="pattern '!nothing' matches no"):
        set_precision(model, ["*", "!nothing"], "weight_only")
    with pytest.raises(ValueError, match="selects no converted layer"):
        set_precision(model, lambda *_: False, "weight_only")
    with pytest.raises(ValueError, match="precision must be one of fp8, weight_only, original, found 'bf16'"):
        set_precision(model, "*", "bf16")
    with pytest.raises(ValueError, match="Linear has no FP8 weights at the moment"):
        set_precision(nn.Linear(3, 3), "*", "fp8")
    with paused(model), pytest.raises(ValueError, match=r"inside of paused\(model\)"):
        set_precision(model, "*", "weight_only")


@pytest.mark.parametrize("precision", ["weight_only", "original"])
@torch.no_grad()
def test_copies_keep_it_and_files_do_not_depend_on_it(precision: str, tmp_path: Path) -> None:
    model, dense = patched()
    fp8 = model(IDS)
    state = model.state_dict()
    save_checkpoint(model, tmp_path / "fp8")
    set_precision(model, "*", precision)
    expected = model(IDS)
    save_checkpoint(model, tmp_path / precision)
    for file in (tmp_path / "fp8").iterdir():
        assert file.read_bytes() == (tmp_path / precision / file.name).read_bytes()
    now = model.state_dict()
    assert now.keys() == state.keys()
    for key, value in state.items():
        assert (value.view(torch.uint8) if value.dtype.itemsize == 1 else value).equal(
            now[key].view(torch.uint8) if value.dtype.itemsize == 1 else now[key]
        )
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert twin(IDS).equal(expected)
        set_precision(twin, "*", "fp8")
        assert twin(IDS).equal(fp8)
    assert model(IDS).equal(expected)
    model.to(torch.float64)
    dense.to(torch.float64)
    assert {row.precision for row in report(model).rows} == {precision}
    if precision == "original":
        assert model(IDS).equal(dense(IDS))


@torch.no_grad()
def test_loading_into_another_precision() -> None:
    model, dense = patched()
    other = enable_fp8_gemm(Model().eval(), options=options(), module_filter=lambda *_: True)
    set_precision(other, "*", "weight_only")
    other.load_state_dict(model.state_dict())
    assert other(IDS).equal(twin_of(dense, "row")(IDS))
    set_precision(other, "*", "fp8")
    assert other(IDS).equal(model(IDS))
    third = enable_fp8_gemm(Model().eval(), options=options(), module_filter=lambda *_: True)
    set_precision(third, "*", "original")
    with pytest.raises(RuntimeError, match=r"head\.weight runs on its original, which FP8 bytes are not"):
        third.load_state_dict(model.state_dict())
    with pytest.raises(UnsupportedError, match="FP8 bytes are no original"):
        third.head.weight.data = other.head.weight.data.clone()[:]
    third.load_state_dict(dense.state_dict())
    assert third(IDS).equal(dense(IDS))


@torch.no_grad()
def test_pausing_and_undoing() -> None:
    model, dense = patched()
    set_precision(model, "*", "weight_only")
    before = model(IDS)
    with paused(model):
        torch.testing.assert_close(model(IDS), dense(IDS))
    assert model(IDS).equal(before)
    set_precision(model, "*", "original")
    disable_fp8_gemm(model)
    assert not any(isinstance(parameter, FP8Weight) for parameter in model.parameters())
    assert all(value.equal(dense.state_dict()[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_layers_that_are_quantized_at_the_first_call() -> None:
    layer = nn.Linear(64, 32)
    dense, weight_only = (
        copy.deepcopy(layer),
        enable_fp8_gemm(copy.deepcopy(layer), options=replace(options(), scheme="weight_only")),
    )
    model = enable_fp8_gemm(layer, options=replace(options(), materialize_fp8_on_wrap=False))
    x = torch.randn(3, 64)
    set_precision(model, "*", "original")
    assert model(x).equal(dense(x))
    set_precision(model, "*", "weight_only")
    assert model(x).equal(weight_only(x))
    set_precision(model, "*", "fp8")
    assert not model(x).equal(weight_only(x))


@torch.no_grad()
def test_compiled_models_are_compiled_once_for_each_precision() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    dense = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16))
    model = enable_fp8_gemm(copy.deepcopy(dense), options=options())
    model(torch.randn(1, 64))  # which is observed by a hook, for the coverage
    functional = torch.compile(lambda x: F.linear(x, model[0].weight), backend=backend)
    compiled, x = torch.compile(model, backend=backend), torch.randn(3, 64)
    for _ in range(2):
        for precision in ("fp8", "weight_only", "original"):
            set_precision(model, "*", precision)
            assert compiled(x).equal(model(x)), precision
            assert functional(x).equal(F.linear(x, model[0].weight)), precision
    assert len(graphs) == 6
    assert compiled(x).equal(dense(x))
