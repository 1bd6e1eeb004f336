"""On a CUDA GPU: kernels against the reference, bit for bit where possible; CUDA graphs; torch.compile.

``pytest tests/engines/test_gpu.py tests/engines/test_engines.py`` checks a GPU completely; the latter runs the
conformance suite.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import conformance
import pytest
import torch
from torch import nn

from fp8gemm import (
    BLOCK_128,
    GROUP_128,
    MX,
    ROW,
    SCHEMES,
    TENSOR,
    FP8GemmOptions,
    FP8Linear,
    MatmulSpec,
    ScaledTensor,
    Scheme,
    UnsupportedError,
    dequantize,
    enable_fp8_gemm,
    fuse_gated,
    probe,
    quantize,
)
from fp8gemm.engines import ENGINES, activations, proof
from fp8gemm.engines.reference import ReferenceEngine
from fp8gemm.engines.triton import engine as triton_engine
from fp8gemm.engines.triton.engine import TritonEngine
from fp8gemm.models.siblings import fuse_siblings
from fp8gemm.models.warmup import warmup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = torch.device(DEVICE)
BF16 = torch.bfloat16
# Every path of the dispatch, at both sides of each change of kernel; aligned and unaligned shapes.
TOKENS = (1, 2, 4, 5, 16, 17, 64, 65, 128, 300, 600, 1030)
SHAPES = ((256, 512), (4096, 4096), (4097, 1000), (2112, 7168), (1, 4096), (36, 60))
ENGINE = TritonEngine()
STATIC = Scheme(weight=TENSOR, activation=TENSOR, static=True)
MX_SCHEME = Scheme(weight=MX, activation=None, scale_format="ue8m0")


# As an error, which warnings are in these tests, it would leave the stream of an empty capture current.
pytestmark = pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")


@pytest.fixture(autouse=True)
def _card() -> None:
    """Skips the test if the engine itself says that it cannot run."""
    reasons = ENGINE.rejects(MatmulSpec(scheme=SCHEMES["row"], n=256, k=256), probe(DEVICE))
    if reasons:
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["row", "tensor", "block", "weight_only"])
def test_exact_products(name: str, shape: tuple[int, int]) -> None:
    """Small integers at every M, compared bitwise, so that no tile, mask or split can be wrong."""
    n, k = shape
    scheme = SCHEMES[name]
    spec = MatmulSpec(scheme=scheme, n=n, k=k)
    weight = conformance._integer_weight(spec, CUDA, zeros=True)
    layout = ENGINE.prepare(weight, scheme)
    for m in TOKENS:
        x = conformance._integer_tokens(m, spec, scheme, CUDA)
        bias = torch.randint(-3, 4, (n,), device=CUDA).to(BF16)
        expected = (x.double() @ conformance._dense(weight).t() + bias.double()).to(BF16)
        assert ENGINE.linear(x, layout, bias, BF16).equal(expected), m


@pytest.mark.parametrize("name", ["row", "block", "weight_only"])
def test_random_products(name: str) -> None:
    """The quantization is the one that ``rounds`` returns, and repeated calls give the same bits."""
    scheme = SCHEMES[name]
    for (n, k), m in itertools.product(SHAPES, TOKENS):
        weight = quantize(torch.randn(n, k, device=CUDA), scheme.weight)
        layout = ENGINE.prepare(weight, scheme)
        x = torch.randn(m, k, device=CUDA).to(BF16)
        y = ENGINE.linear(x, layout, None, BF16)
        rounded = ReferenceEngine().rounded(x, replace(layout, scheme=ENGINE.rounds(m, layout)))
        expected = rounded.double() @ dequantize(weight, torch.float64).t()
        assert (y.double() - expected).norm() <= ENGINE.tolerance * expected.norm(), (n, k, m)
        assert ENGINE.linear(x, layout, None, BF16).equal(y), (n, k, m)


@pytest.mark.parametrize("accumulate", ["fast", "precise"])
def test_long_sums_with_outliers(accumulate: str) -> None:
    """Cancellation at K = 16384; precise accumulation loses nothing that bfloat16 can represent."""
    scheme = SCHEMES["row"]
    n, k = 4112, 16384
    weight = quantize(torch.randn(n, k, device=CUDA), ROW)
    x = torch.randn(256, k, device=CUDA)
    x[:, 0] = 1e3
    layout = replace(ENGINE.prepare(weight, scheme), accumulate=accumulate)
    y = ENGINE.linear(x.to(BF16), layout, None, BF16).double()
    rounded = dequantize(quantize(x.to(BF16), ROW), torch.float64)
    expected = rounded @ dequantize(weight, torch.float64).t()
    allowed = 2e-2 if accumulate == "fast" else 3e-3  # DeepSeek-V3 report, 3.3.2; one rounding to bfloat16
    assert (y - expected).norm() <= allowed * expected.norm()


@pytest.mark.parametrize("k", [1, 7, 128, 4096, 14336, 32768, 40000])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_quantization_bit_for_bit(k: int, ue8m0: bool) -> None:
    from fp8gemm.engines.triton.kernels import quantize as kernels

    x = torch.randn(37, k, device=CUDA).to(BF16)
    x[0], x[1, 0], x[2, -1], x[3] = 0, float("nan"), float("inf"), 1e-38
    scale_format = "ue8m0" if ue8m0 else "float32"
    for kernel, granularity in ((kernels.quantize_rows, ROW), (kernels.quantize_groups, GROUP_128)):
        data, scale = kernel(x, kernels.Rounding(ue8m0=ue8m0))
        expected = quantize(x, granularity, scale_format=scale_format)
        assert scale.equal(expected.scale)
        assert data.float().nan_to_num(nan=1e9).equal(expected.data.float().nan_to_num(nan=1e9))


@pytest.mark.parametrize("n", [4112, 4097])  # by torch's product where it has one, and by the row kernel
def test_more_than_32_bits_of_elements(n: int) -> None:
    """M * K and M * N beyond 2**31: the last rows are correct."""
    from fp8gemm.engines.triton.kernels import quantize as kernels

    m, k = 2**31 // 4096 + 64, 4096
    x = torch.zeros(m, k, dtype=BF16, device=CUDA)
    x[-64:] = torch.randint(-1, 2, (64, k), device=CUDA)
    x[:, 0] = 448
    data, _ = kernels.quantize_rows(x)
    assert data[-64:].float().equal(x[-64:].float())
    weight = ScaledTensor(torch.ones(n, k, device=CUDA).to(torch.float8_e4m3fn), torch.ones(n, 1, device=CUDA), ROW)
    y = ENGINE.linear(x, ENGINE.prepare(weight, SCHEMES["row"]), None, BF16)
    assert y[-64:].double().equal(x[-64:].double().sum(1, keepdim=True).to(BF16).double().expand(64, n))


@pytest.mark.parametrize("name", ["row", "block", "weight_only"])
@pytest.mark.parametrize("ends", [[40, 80, 120, 160], [0, 0, 150, 150], [160, 160, 160, 160], [3, 30, 31, 90]], ids=str)
def test_grouped_products(name: str, ends: list[int]) -> None:
    scheme = SCHEMES[name]
    experts, n, k, tokens = 4, 520, 384, 160
    spec = MatmulSpec(scheme=scheme, n=n, k=k)
    weights = [conformance._integer_weight(spec, CUDA, zeros=True) for _ in range(experts)]
    stack = ScaledTensor(torch.stack([w.data for w in weights]), torch.stack([w.scale for w in weights]), scheme.weight)
    x = conformance._integer_tokens(tokens, spec, scheme, CUDA)
    y = ENGINE.grouped(
        x, ENGINE.prepare_stack(stack, scheme), torch.tensor(ends, dtype=torch.int32, device=CUDA), None, BF16
    )
    expected = torch.zeros(tokens, n, dtype=torch.float64, device=CUDA)
    for weight, start, end in zip(weights, [0, *ends], ends, strict=False):
        expected[start:end] = x[start:end].double() @ conformance._dense(weight).t()
    assert y.equal(expected.to(BF16))


def _layer(n: int = 4096, k: int = 4096, **options: object) -> FP8Linear:
    linear = nn.Linear(k, n, device=CUDA, dtype=BF16).requires_grad_(False)
    return FP8Linear.from_linear(linear, FP8GemmOptions(engine="triton", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("m", [1, 16, 64, 256, 2048])
@pytest.mark.parametrize("scheme", ["row", "block"])
def test_a_graph_replays_what_eager_computes(m: int, scheme: str) -> None:
    """Replays give the same bits with new inputs, and with an eager call between two replays."""
    layer = _layer(scheme=scheme)
    x = torch.randn(m, 4096, device=CUDA, dtype=BF16)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = y.clone()
        assert replayed.equal(layer(x))


def test_two_streams_at_once() -> None:
    """Split products on two streams do not share counters."""
    layer = _layer(512, 8192)
    xs = [torch.randn(16, 8192, device=CUDA, dtype=BF16) for _ in range(2)]
    expected = [layer(x) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    for _ in range(50):
        found = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(layer(x))
        torch.cuda.synchronize()
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("m", [1, 3, 16, 64, 200, 2048])
@pytest.mark.parametrize("scheme", ["row", "block"])
@torch.no_grad()
def test_bound_calls(scheme: str, m: int) -> None:
    """The third call with a shape replays a tape: the same bits, in eager mode and in a CUDA graph, on any stream."""
    layer = _layer(512, 4096, scheme=scheme, fp16_weight_storage="discard")
    xs = [torch.randn(m, 4096, device=CUDA, dtype=BF16) for _ in range(4)]
    expected = [FP8Linear._run(x, layer.weight, layer.bias) for x in xs]  # type: ignore[arg-type]
    found = [layer(x) for x in xs]
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        found += [layer(x) for x in xs]
    torch.cuda.synchronize()
    assert all(a.equal(b) for a, b in zip(found, expected * 2, strict=True))
    graph = torch.cuda.CUDAGraph()
    given = xs[0].clone()
    with torch.cuda.graph(graph):
        y = layer(given)
    for x, right in zip(xs, expected, strict=True):
        given.copy_(x)
        graph.replay()
        assert y.equal(right)


def test_quantizing_inside_a_capture_raises() -> None:
    layer = _layer(materialize_fp8_on_wrap=False)
    x = torch.randn(4, 4096, device=CUDA, dtype=BF16)
    torch.cuda.synchronize()
    with pytest.raises(UnsupportedError, match="cannot be quantized while a CUDA graph is captured"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            layer(x)


@pytest.mark.parametrize("scheme", ["row", "block"])
def test_compiles_whole_and_twice(scheme: str) -> None:
    """No graph break; one graph for few tokens and one for many, in which the compiler sees their quantization."""
    layer = _layer(512, 512, scheme=scheme)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for m in (7, 3, 100, 33, 700):
        x = torch.randn(m, 512, device=CUDA, dtype=BF16)
        assert compiled(x).equal(layer(x))
    assert len(graphs) == 2
    targets = [{str(node.target) for node in graph.graph.nodes} for graph in graphs]
    assert ["amax" in names for names in targets] == [False, True]


def test_inductor() -> None:
    model = nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512))
    model = model.to(device=CUDA, dtype=BF16).requires_grad_(False)
    enable_fp8_gemm(model, options=FP8GemmOptions(engine="triton"))
    compiled = torch.compile(model, fullgraph=True)
    for m in (8, 200):
        x = torch.randn(m, 512, device=CUDA, dtype=BF16)
        torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)


def test_warm_layers_compile_nothing_more() -> None:
    from fp8gemm.engines.triton.launch import _compiled

    layer = _layer(768, 1536)
    warmup(layer, tokens=[1, 16, 100])
    known = len(_compiled)
    for m in (1, 13, 16, 90):
        layer(torch.randn(m, 1536, device=CUDA, dtype=BF16))
    assert len(_compiled) <= known + 1  # 9 to 15 tokens differ from 16 in whether M is a multiple of 16


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize("scheme", [*SCHEMES.values(), STATIC, MX_SCHEME], ids=str)
def test_the_card_is_trusted(name: str, scheme: Scheme, experts: int) -> None:
    """Every engine that accepts a problem proves itself."""
    spec = MatmulSpec(scheme=scheme, n=4096, k=4096, experts=experts)
    device = torch.device("cuda", torch.cuda.current_device())
    if reasons := ENGINES[name].rejects(spec, probe(device)):
        pytest.skip("; ".join(reasons))
    assert proof.problem(ENGINES[name], spec, device) == ""


def test_our_quantization_is_used_before_libraries() -> None:
    assert activations.fused(torch.device("cuda", torch.cuda.current_device()))
    assert triton_engine.looks_up(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("m", [1, 16, 64])
@torch.no_grad()
def test_graphs_that_torch_compile_captures(m: int) -> None:
    """``mode="reduce-overhead"`` allows nothing but outputs to live in the memory pool of its graphs."""
    model = nn.Sequential(nn.Linear(4096, 1024), nn.GELU(), nn.Linear(1024, 4096)).to(device=CUDA, dtype=BF16)
    enable_fp8_gemm(model, options=FP8GemmOptions(engine="triton"))
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(m, 4096, device=CUDA, dtype=BF16)
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(x).clone(), model(x), rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_gated_mlps() -> None:
    """Activation function and quantization run in one kernel from 65 tokens on, with gate and up fused or not."""

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(512, 1024), nn.Linear(512, 1024), nn.Linear(1024, 512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    for scheme in ("row", "block"):
        model = Mlp().to(device=CUDA, dtype=BF16).requires_grad_(False)
        options = FP8GemmOptions(engine="triton", scheme=scheme, fp16_weight_storage="discard")  # type: ignore[arg-type]
        enable_fp8_gemm(model, options=options)
        xs = [torch.randn(m, 512, device=CUDA, dtype=BF16) for m in (1, 64, 65, 300)]
        plain = [model(x) for x in xs]
        assert len(fuse_gated(model).groups) == 1
        found = [model(x) for x in xs]
        fuse_siblings(model, [("gate", "up")])
        found += [model(x.clone()) for _ in range(3) for x in xs]
        for y, expected in zip(found, plain * 4, strict=True):
            assert (y - expected).norm() <= 4e-2 * expected.norm()


@torch.no_grad()
def test_a_kept_weight_where_fp8_would_lose() -> None:
    """256 outputs of 4096 tokens: quantizing the tokens costs more than the product saves."""
    linear = nn.Linear(4096, 256, device=CUDA, dtype=BF16)
    layer = FP8Linear.from_linear(linear, FP8GemmOptions(engine="triton", fp16_weight_storage="keep"))
    x = torch.randn(4096, 4096, device=CUDA, dtype=BF16)
    for _ in range(3):
        assert layer(x).equal(linear(x))
    assert not layer(x[:16]).equal(linear(x[:16]))


def test_joined_siblings_in_a_graph() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(512, n) for n in (512, 128, 128))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)

    model = Attention().to(device=CUDA, dtype=BF16).requires_grad_(False)
    enable_fp8_gemm(model, options=FP8GemmOptions(engine="triton"))
    x = torch.randn(16, 512, device=CUDA, dtype=BF16)
    alone = model(x)
    fuse_siblings(model)
    for _ in range(2):
        model(x.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    graph.replay()
    torch.testing.assert_close(y, alone, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("index", range(max(1, torch.cuda.device_count())))
def test_every_card_of_the_machine(index: int) -> None:
    """The layer runs on its own device, whichever device is current."""
    weight = quantize(torch.randn(256, 256, device=f"cuda:{index}"), ROW)
    layout = ENGINE.prepare(weight, SCHEMES["row"])
    x = torch.randn(16, 256, device=f"cuda:{index}", dtype=BF16)
    y = ENGINE.linear(x, layout, None, BF16)
    assert y.device == x.device
    expected = x.float() @ dequantize(weight).t()
    assert (y.float() - expected).norm() <= 4e-3 * expected.norm()


def test_every_code_of_a_weight() -> None:
    """All 256 codes reach the product, and NaN affects only its own output."""
    code = torch.arange(256, dtype=torch.uint8, device=CUDA).view(256, 1).expand(256, 64).contiguous()
    weight = ScaledTensor(code.view(torch.float8_e4m3fn), torch.ones(256, 1, device=CUDA), ROW)
    layout = ENGINE.prepare(weight, Scheme(weight=ROW, activation=None))
    x = torch.zeros(20, 64, device=CUDA, dtype=BF16)
    x[:, 5] = 1
    for m in (1, 4, 20):
        y = ENGINE.linear(x[:m], layout, None, BF16)
        torch.testing.assert_close(
            y, code.view(torch.float8_e4m3fn)[:, 0].to(BF16).expand(m, 256), rtol=0, atol=0, equal_nan=True
        )


def test_ragged_blocks() -> None:
    """Block scales with values of K / 128 and M that are difficult for library layouts."""
    scheme = Scheme(weight=BLOCK_128, activation=GROUP_128)
    for groups, m in itertools.product((1, 2, 3, 5, 18), (1, 2, 3, 5, 513, 515)):
        k = 128 * groups
        spec = MatmulSpec(scheme=scheme, n=384, k=k)
        weight = conformance._integer_weight(spec, CUDA, zeros=True)
        x = conformance._integer_tokens(m, spec, scheme, CUDA)
        y = ENGINE.linear(x, ENGINE.prepare(weight, scheme), None, BF16)
        assert y.equal((x.double() @ conformance._dense(weight).t()).to(BF16)), (groups, m)
