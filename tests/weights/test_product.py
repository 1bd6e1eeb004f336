"""What torch.compile sees of a product: an operation, after the quantization of activations where it can be fused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp8gemm
from fp8gemm import (
    GROUP_128,
    ROW,
    SCHEMES,
    FP8GemmOptions,
    FP8Linear,
    ScaledTensor,
    Scheme,
    dequantize,
    enable_fp8_gemm,
    quantize,
)
from fp8gemm.engines import ENGINES, PackedWeight
from fp8gemm.engines.reference import ReferenceEngine
from fp8gemm.engines.triton.engine import TritonEngine
from fp8gemm.engines.triton.plan import place
from fp8gemm.weights import operation, product, remembered

BEYOND = 8


class Apart(ReferenceEngine):
    """Does not quantize up to 8 tokens, as a GPU engine does, and quantizes more before its product."""

    traceable = False

    def rounds(self, m, weight, dtype=torch.bfloat16):
        return weight.scheme if m > BEYOND else weight.scheme.weight_only()

    def linear(self, x, weight, bias, out_dtype):
        scheme = self.rounds(x.shape[0], weight)
        return super().linear(x, replace(weight, scheme=scheme), bias, out_dtype)

    def prepare(self, weight, scheme, *, input_scale=None):
        packed = super().prepare(weight, scheme, input_scale=input_scale)
        return replace(packed, apart=scheme.activation, few=BEYOND)

    def linear_quantized(self, x: ScaledTensor, weight, bias, out_dtype):
        unrounded = replace(weight, scheme=weight.scheme.weight_only())
        return super().linear(dequantize(x), unrounded, bias, out_dtype)


class Graphs:
    """A backend that records its graph and runs it unchanged."""

    def __init__(self) -> None:
        self.seen: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: object) -> object:
        self.seen.append(graph)
        return graph.forward

    def names(self, index: int) -> str:
        return " ".join(str(node.target) for node in self.seen[index].graph.nodes)


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    engines = {**ENGINES, "reference": Apart()}
    for room in (operation, product, remembered, fp8gemm.engines.choice):
        monkeypatch.setattr(room, "ENGINES", engines)


def layer_of(scheme: str = "row", **more: object) -> FP8Linear:
    linear = nn.Linear(256, 64).requires_grad_(False)
    options = FP8GemmOptions(engine="reference", scheme=scheme, fp16_weight_storage="discard", **more)  # type: ignore[arg-type]
    return FP8Linear.from_linear(linear, options)


@pytest.mark.parametrize("scheme", ["row", "tensor", "block"])
def test_the_compiler_sees_the_rounding(scheme: str) -> None:
    layer, graphs = layer_of(scheme), Graphs()
    x = torch.randn(40, 256)
    assert torch.compile(layer, fullgraph=True, backend=graphs)(x).equal(layer(x))
    assert "amax" in graphs.names(0)
    assert graphs.names(0).count("fp8gemm.linear") == 1


def test_static_scales_too() -> None:
    linear = nn.Linear(256, 64).requires_grad_(False)
    scheme = replace(FP8GemmOptions(scheme="tensor").resolved_scheme, static=True)
    options = FP8GemmOptions(engine="reference", scheme=scheme, fp16_weight_storage="discard")
    dense = FP8Linear.from_linear(linear, FP8GemmOptions(engine="reference", scheme="tensor"))
    layer = FP8Linear.convert(linear, options, weight=dense.scaled(), input_scale=torch.tensor(0.005))
    x, graphs = torch.randn(40, 256), Graphs()
    assert torch.compile(layer, fullgraph=True, backend=graphs)(x).equal(layer(x))
    assert "amax" not in graphs.names(0)
    assert "clamp" in graphs.names(0)


def test_few_tokens_are_left_to_the_engine() -> None:
    layer, graphs = layer_of(), Graphs()
    x = torch.randn(BEYOND, 256)
    assert torch.compile(layer, fullgraph=True, backend=graphs)(x).equal(layer(x))
    assert "amax" not in graphs.names(0)


def test_two_graphs_serve_every_number_of_tokens() -> None:
    layer, graphs = layer_of(), Graphs()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    for m in (3, 100, 5, 9, 8, 31, 2, 700):
        x = torch.randn(m, 256)
        assert compiled(x).equal(layer(x)), m
    assert len(graphs.seen) == 2


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_serves_every_number_of_tokens(strict: bool) -> None:
    layer = layer_of().eval()
    shapes = ({0: torch.export.Dim("m", max=1000)},)
    exported = torch.export.export(layer, (torch.randn(40, 256),), dynamic_shapes=shapes, strict=strict).module()
    for m in (3, 40, 700):
        x = torch.randn(m, 256)
        assert exported(x).equal(layer(x)), m


def test_inductor_and_gradients() -> None:
    model = nn.Sequential(nn.LayerNorm(256), layer_of()).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(40, 256, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, model(x), rtol=2e-2, atol=2e-2)
    y.square().sum().backward()
    found, x.grad = x.grad, None
    model(x).square().sum().backward()
    assert found is not None
    assert x.grad is not None
    assert (found - x.grad).norm() <= 3e-2 * x.grad.norm()


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace:DeprecationWarning",
    "ignore:`torch.jit.trace:FutureWarning",
    "ignore::torch.jit.TracerWarning",
)
def test_jit_tracing_records_the_product() -> None:
    """The outputs are not recorded as constants."""
    layer = layer_of()
    traced = torch.jit.trace(layer, torch.randn(20, 256))
    for m in (20, 33):
        x = torch.randn(m, 256)
        torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("scheme", ["row", "block"])
def test_the_triton_engine_is_traced_without_a_card(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile does not trace into its dispatch, which reads files and queries drivers."""
    monkeypatch.setattr(TritonEngine, "place", lambda engine, device: place((9, 0)))
    monkeypatch.setattr(TritonEngine, "rejects", lambda engine, spec, machine: [])
    linear = nn.Linear(512, 64, dtype=torch.bfloat16).requires_grad_(False)
    options = FP8GemmOptions(engine="triton", scheme=scheme, fp16_weight_storage="discard")  # type: ignore[arg-type]
    layer = FP8Linear.from_linear(linear, options)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))

        def run(*given: object) -> tuple[torch.Tensor]:
            x = next(
                one for one in given if isinstance(one, torch.Tensor) and one.dtype == torch.bfloat16 and one.dim() == 2
            )
            return (torch.zeros(x.shape[0], 64),)

        return run

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for m in (7, 3, 100, 16, 700):
        assert compiled(torch.randn(m, 512, dtype=torch.bfloat16)).shape == (m, 64)
    assert ["amax" in names for names in graphs] == [False, True]


class Remembers(nn.Module):
    """Changes a dict before its product, as caches and keyword arguments do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, cache: dict[str, torch.Tensor]) -> torch.Tensor:
        cache["seen"] = x
        return self.linear(x)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_a_forward_that_changes_a_dict_compiles_whole(engine: str) -> None:
    model = fp8gemm.enable_fp8_gemm(Remembers(), options=FP8GemmOptions(engine=engine))
    x, cache = torch.randn(2, 64), {}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, cache), model(x, {}), atol=1e-5)
    assert cache["seen"] is x
    assert torch._dynamo.explain(model)(x, {}).graph_break_count == 0


@pytest.mark.parametrize(
    "how",
    [lambda x, layer: F.linear(x, layer.weight, layer.bias), lambda x, layer: x @ layer.weight.T],
    ids=["linear", "matmul"],
)
def test_products_of_the_parameter_compile_with_an_engine_that_is_traced_and_derives(how) -> None:
    """A traced graph receives the weight without the tensors that the engine derived for torch's products."""
    layer = enable_fp8_gemm(nn.Linear(64, 96), options=FP8GemmOptions(engine="torch", scheme="tensor"))
    x = torch.randn(40, 64)
    with torch.no_grad():
        assert torch.compile(how, fullgraph=True, backend="aot_eager")(x, layer).equal(how(x, layer))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.10's own archive
@pytest.mark.parametrize("extra", [False, True], ids=["plain", "derived"])
def test_an_exported_program_holds_its_bytes_once_and_takes_others(extra: bool, monkeypatch, tmp_path) -> None:
    """Also if the engine multiplies by tensors derived from the bytes, such as a scale per column."""
    if extra:
        monkeypatch.setattr(fp8gemm.engines.cpu, "_library", lambda *operands: None)
    monkeypatch.setattr(product, "ENGINES", ENGINES)
    linears = (nn.Linear(512, 512), nn.Linear(512, 512))
    first, second = (fp8gemm.enable_fp8_gemm(linear.requires_grad_(False)) for linear in linears)
    packed = first.home.stored.packed
    assert bool(packed.extra) == extra or not extra  # machines without a compiler derive tensors in both cases
    x = torch.randn(2, 512)
    exported = torch.export.export(first, (x,))
    torch.export.save(exported, tmp_path / "program.pt2")
    assert (tmp_path / "program.pt2").stat().st_size < 1.3 * 512 * 512
    program = torch.export.load(tmp_path / "program.pt2").module()
    assert program(x).equal(first(x))
    program.load_state_dict({"weight": second.weight, "bias": second.bias})
    assert program(x).equal(second(x))


@pytest.mark.parametrize("scheme", [*SCHEMES.values(), replace(SCHEMES["tensor"], static=True)], ids=str)
@pytest.mark.parametrize("bare", [False, True])
def test_attributes_survive_as_a_text(scheme: Scheme, bare: bool) -> None:
    """The names of derived tensors are the only thing that a text does not carry."""
    scheme = replace(scheme, scale_format="ue8m0")
    weight = ENGINES["reference"].prepare(quantize(torch.randn(256, 128), scheme.weight), scheme)
    weight = replace(weight, accumulate="precise", bare=bare)
    found = operation._attributes(operation._text(weight, GROUP_128))
    assert found.pop("x_block") == [1, 128]
    assert found.pop("derive") == bare
    other = operation._form_of(weight.data, weight.scale, [weight.n, weight.k], **found)
    assert (other.engine, other.accumulate, other.scheme) == (weight.engine, weight.accumulate, weight.scheme)


class Deriving(ReferenceEngine):
    """An engine that derives the dense weight and binds calls to it, which it counts."""

    name = "deriving"

    def __init__(self) -> None:
        self.bound = 0

    def prepare(self, weight: ScaledTensor, scheme: Scheme, **more: object) -> PackedWeight:
        packed = super().prepare(weight, scheme, **more)
        return replace(packed, extra={"dense": dequantize(weight)})

    def linear(self, x, weight, bias, out_dtype):
        return F.linear(x, weight.extra["dense"], bias)

    def bind(self, x, weight, bias, out_dtype):
        def bound(x: torch.Tensor) -> torch.Tensor:
            self.bound += 1
            return self.linear(x, weight, bias, out_dtype)

        return bound


def test_bound_calls_of_derived_weights_end_with_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled graphs receive the bytes; what was derived from them is bound from the second call on, until a write."""
    engine = Deriving()
    for room in (operation, remembered, fp8gemm.engines.choice):
        monkeypatch.setattr(room, "ENGINES", {**ENGINES, "deriving": engine})
    weight = engine.prepare(quantize(torch.randn(32, 64), ROW), SCHEMES["row"])
    bare, x = replace(weight, bare=True, extra={}), torch.randn(4, 64)

    def product() -> torch.Tensor:
        shape = [weight.n, weight.k]
        return torch.ops.fp8gemm.linear.text(
            x, bare.data, bare.scale, shape, x.dtype, operation._text(bare, None), None, None, None
        )

    for _ in range(4):
        assert product().equal(F.linear(x, dequantize(engine.restore(weight))))
    assert engine.bound == 2
    with torch.no_grad():
        bare.data.view(torch.uint8).zero_()
    assert not product().any()
    assert engine.bound == 2
