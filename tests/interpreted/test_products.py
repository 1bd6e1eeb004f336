"""Every kernel passes the conformance suite by itself, and all of them together with the engine's own dispatch."""

from __future__ import annotations

from dataclasses import replace

import conformance
import pytest
import torch
from stage import ADA, AMPERE, HOPPER, MACHINE, Held, OnCard, packed

from fp8gemm import (
    BLOCK_128,
    GROUP_128,
    MX,
    ROW,
    TENSOR,
    MatmulSpec,
    ScaledTensor,
    Scheme,
    dequantize,
    quantize,
)
from fp8gemm.engines import Engine, proof
from fp8gemm.engines.reference import ReferenceEngine
from fp8gemm.engines.triton import engine as triton_engine
from fp8gemm.engines.triton import paths
from fp8gemm.engines.triton.kernels import row, w8a16
from fp8gemm.engines.triton.plan import Place, Plan

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")
ROW_ROW = Scheme(weight=ROW, activation=ROW)
BLOCK = Scheme(weight=BLOCK_128, activation=GROUP_128)

VECTORS = Plan(path="vectors", block_n=8, block_k=128)
TOKENS = Plan(path="tokens", block_m=32, block_n=64, block_k=32)
ROWS = Plan(path="rows", block_m=64, block_n=64, block_k=128, tma=False)
BLOCKS = Plan(path="blocks", block_m=32, block_n=64, block_k=128)
# name -> engine, scheme, dtype, (N, K)
CASES = {
    "tokens": (Held(TOKENS, rounds_to="nothing"), ROW_ROW, BF16, (130, 200)),
    "tokens, split": (Held(replace(TOKENS, splits=4), rounds_to="nothing"), ROW_ROW, FP16, (17, 200)),
    "tokens, tensor": (Held(TOKENS, rounds_to="nothing"), Scheme(weight=TENSOR, activation=None), FP32, (17, 33)),
    "tokens, blocks": (Held(TOKENS, rounds_to="nothing"), Scheme(weight=BLOCK_128, activation=None), BF16, (130, 200)),
    "tokens, mx": (
        Held(replace(TOKENS, splits=2), rounds_to="nothing"),
        Scheme(weight=MX, activation=None, scale_format="ue8m0"),
        BF16,
        (17, 72),
    ),
    "tokens, bytes": (Held(TOKENS, rounds_to="nothing", where=AMPERE), ROW_ROW, BF16, (40, 96)),
    "tokens, one output": (Held(TOKENS, rounds_to="nothing"), ROW_ROW, BF16, (1, 7)),
    "rows": (Held(ROWS, rounds_to="rows"), ROW_ROW, BF16, (130, 200)),
    "rows, TMA": (Held(replace(ROWS, tma=True), rounds_to="rows"), ROW_ROW, FP16, (72, 144)),
    "rows, tensor": (Held(ROWS, rounds_to="rows"), Scheme(weight=TENSOR, activation=TENSOR), FP32, (17, 33)),
    "rows, one output": (Held(ROWS, rounds_to="rows"), ROW_ROW, BF16, (1, 7)),
    "blocks": (Held(BLOCKS, rounds_to="groups"), BLOCK, BF16, (130, 200)),
    "blocks, split": (Held(replace(BLOCKS, splits=2), rounds_to="groups"), BLOCK, FP16, (17, 300)),
    "blocks, ue8m0": (Held(BLOCKS, rounds_to="groups"), replace(BLOCK, scale_format="ue8m0"), FP32, (17, 33)),
    "blocks, one output": (Held(BLOCKS, rounds_to="groups"), BLOCK, BF16, (1, 7)),
    "library": (Held(Plan(path="library"), rounds_to="rows"), ROW_ROW, BF16, (48, 96)),
    "dense": (
        Held(Plan(path="dense"), rounds_to="nothing"),
        Scheme(weight=BLOCK_128, activation=None),
        BF16,
        (40, 200),
    ),
    "dense, bytes": (Held(Plan(path="dense"), rounds_to="nothing", where=AMPERE), ROW_ROW, BF16, (40, 96)),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("check", conformance.CHECKS)
def test_kernel_conforms(check, case: str) -> None:
    engine, scheme, dtype, (n, k) = CASES[case]
    spec = MatmulSpec(scheme=scheme, n=n, k=k, compute_dtype=dtype)
    assert engine.rejects(spec, MACHINE) == []
    check(engine, spec, CPU)


class LostLastProgram(Held):
    def linear(self, x, weight, bias, out_dtype):
        y = super().linear(x, weight, bias, out_dtype)
        y[:, -1] = 0
        return y


def test_a_broken_kernel_is_caught() -> None:
    spec = MatmulSpec(scheme=ROW_ROW, n=17, k=33)
    with pytest.raises(AssertionError):
        conformance.exact_products(LostLastProgram(TOKENS, rounds_to="nothing"), spec, CPU)


@pytest.mark.parametrize("where", [HOPPER, ADA, AMPERE], ids=lambda where: where.arch)
@pytest.mark.parametrize("scheme", [ROW_ROW, BLOCK, Scheme(weight=MX, activation=None)], ids=str)
def test_dispatch_is_exact_at_every_m(scheme: Scheme, where) -> None:
    """The engine's own choice of kernel, at every change of kernel."""
    engine, spec = OnCard(where), MatmulSpec(scheme=scheme, n=40, k=160)
    weight = conformance._integer_weight(spec, CPU, zeros=True)
    layout = engine.prepare(weight, scheme)
    plans = set()
    for m in (0, 1, 2, 3, 4, 5, 16, 33, 64, 65, 130, 300):
        x = conformance._integer_tokens(m, spec, scheme, CPU).to(BF16)
        bias = torch.randint(-3, 4, (spec.n,)).to(BF16)
        expected = x.double() @ conformance._dense(weight).t() + bias.double()
        assert engine.linear(x, layout, bias, BF16).double().equal(expected.to(BF16).double()), m
        plans.add(engine.plan(max(m, 1), layout, BF16))
    assert len(plans) > 2


@pytest.mark.parametrize("m", [3, 33, 70])
@pytest.mark.parametrize("scheme", [ROW_ROW, BLOCK, replace(BLOCK, scale_format="ue8m0")], ids=str)
def test_rounds_says_what_happens(m: int, scheme: Scheme) -> None:
    """Random operands agree with the reference under the scheme that ``rounds`` returns for these tokens."""
    engine = OnCard()
    weight = quantize(torch.randn(40, 160), scheme.weight)
    layout = engine.prepare(weight, scheme)
    x = torch.randn(m, 160).to(BF16)
    y = engine.linear(x, layout, None, FP32)
    rounded = ReferenceEngine().rounded(x, replace(layout, scheme=engine.rounds(m, layout)))
    expected = rounded.float() @ dequantize(weight).t()
    assert (y - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("native", [True, False])
def test_vectors(tokens: int, splits: int, native: bool) -> None:
    scheme = Scheme(weight=ROW, activation=None)
    weight = quantize(torch.randn(17, 100), ROW)
    layout = packed(weight, scheme)
    x, bias = torch.randn(tokens, 100).to(BF16), torch.randn(17).to(BF16)
    multiply = lambda: w8a16.multiply_vectors(  # noqa: E731
        x, layout, bias, FP32, native=native, block_n=4, block_k=16, splits=splits, warps=4
    )
    expected = x.float() @ dequantize(weight).t() + bias.float()
    y = multiply()
    assert (y - expected).norm() <= 1e-6 * expected.norm()
    assert multiply().equal(y), "the same call gave other bits"


def test_vectors_conform() -> None:
    """The suite's checks for at most four tokens."""
    engine = Held(VECTORS, rounds_to="nothing")
    for n, k in ((17, 33), (1, 7)):
        spec = MatmulSpec(scheme=ROW_ROW, n=n, k=k)
        conformance.wide_accumulation(engine, spec, CPU)
        weight = conformance._integer_weight(spec, CPU, zeros=True)
        for m in (1, 2, 3, 4):
            x = torch.randint(-1, 2, (m, k)).to(BF16)
            y = engine.linear(x, engine.prepare(weight, ROW_ROW), None, BF16)
            assert y.double().equal(x.double() @ conformance._dense(weight).t())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("out", [BF16, FP16, FP32])
@pytest.mark.parametrize("native", [True, False])
def test_every_code_decodes(dtype: torch.dtype, out: torch.dtype, native: bool) -> None:
    """All 256 codes, subnormals, infinities and NaN included."""
    code = torch.arange(256, dtype=torch.uint8).view(2, 128).view(dtype)
    weight = ScaledTensor(code, torch.ones(2, 1), ROW)
    w = w8a16.dense(packed(weight, Scheme(weight=ROW, activation=None)), out, native=native)
    torch.testing.assert_close(w, code.to(out), rtol=0, atol=0, equal_nan=True)


def test_e5m2_weights_multiply() -> None:
    scheme = Scheme(weight=ROW, activation=ROW)
    weight = quantize(torch.randn(17, 64), ROW, dtype=torch.float8_e5m2)
    engine = OnCard()
    for m in (1, 20, 70):
        x = torch.randn(m, 64).to(BF16)
        y = engine.linear(x, engine.prepare(weight, scheme), None, FP32)
        expected = x.float() @ dequantize(weight).t()
        assert (y - expected).norm() <= 1e-5 * expected.norm(), m


def test_counters_are_left_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A split product leaves its counters at zero; otherwise the next one would be wrong."""
    counters = torch.zeros(6, dtype=torch.int32)
    monkeypatch.setattr(w8a16, "split_counters", lambda tiles, device: counters[:tiles])
    scheme = Scheme(weight=ROW, activation=None)
    layout = packed(quantize(torch.randn(40, 128), ROW), scheme)
    x = torch.randn(20, 128).to(BF16)
    first, second = (
        w8a16.multiply_tokens(
            x, layout, None, BF16, native=True, block_m=16, block_n=16, block_k=16, splits=4, warps=4, stages=1
        )
        for _ in range(2)
    )
    assert first.equal(second)
    assert not counters.any()


def test_promotion_and_tiles_change_nothing_that_is_exact() -> None:
    spec = MatmulSpec(scheme=ROW_ROW, n=72, k=144)
    weight = conformance._integer_weight(spec, CPU, zeros=True)
    layout = packed(weight, ROW_ROW)
    x = torch.randint(-1, 2, (70, 144)).to(torch.float8_e4m3fn)
    scale = 2.0 ** torch.randint(-1, 2, (70, 1))
    expected = (x.double() * scale) @ conformance._dense(weight).t()
    for promotion, tma, programs, (block_m, block_n, block_k) in (
        ("none", True, 2, (32, 16, 128)),
        ("sum", False, 5, (16, 32, 64)),
        ("instruction", True, 1, (128, 64, 128)),
    ):
        y = row.multiply_rows(
            x,
            scale,
            layout,
            None,
            FP32,
            promotion=promotion,
            tma=tma,
            programs=programs,
            block_m=block_m,
            block_n=block_n,
            block_k=block_k,
            warps=4,
            stages=1,
        )
        assert y.double().equal(expected), (promotion, tma)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("name", ["row", "tensor", "static", "block", "ue8m0"])
def test_activations_quantized_before(name: str, library: bool) -> None:
    """As in torch.compile, with the quantization outside, in torch: the same bits, whatever plan such an M has."""
    scheme = {
        "row": ROW_ROW,
        "tensor": Scheme(weight=TENSOR, activation=TENSOR),
        "static": Scheme(weight=TENSOR, activation=TENSOR, static=True),
        "block": BLOCK,
        "ue8m0": replace(BLOCK, scale_format="ue8m0"),
    }[name]
    engine = OnCard(HOPPER if library and scheme.weight != BLOCK_128 else replace_library(HOPPER))
    static = torch.tensor(0.02) if scheme.static else None
    weight = quantize(torch.randn(48, 128), scheme.weight, scale_format=scheme.scale_format)
    layout = engine.prepare(weight, scheme, input_scale=static)
    bias = torch.randn(48).to(BF16)
    assert layout.apart is not None
    empty = quantize(torch.empty(0, 128), layout.apart)
    assert engine.linear_quantized(empty, layout, bias, BF16).shape == (0, 48)
    for m in (3, 65, 130):
        x = torch.randn(m, 128).to(BF16)
        before = quantize(x, layout.apart, scale=static, scale_format=scheme.scale_format)
        y = engine.linear_quantized(before, layout, bias, BF16)
        if m > layout.few:
            assert y.equal(engine.linear(x, layout, bias, BF16)), m
        expected = dequantize(before).double() @ dequantize(weight, torch.float64).t() + bias.double()
        assert (y.double() - expected).norm() <= engine.tolerance * expected.norm(), m


@pytest.mark.parametrize("scheme", [ROW_ROW, BLOCK], ids=["row", "block"])
def test_gate_times_up_and_its_product(scheme: Scheme) -> None:
    engine = OnCard(replace_library(HOPPER))
    layout = engine.prepare(quantize(torch.randn(40, 256), scheme.weight), scheme)
    few = 16 if scheme is BLOCK else 64  # so few tokens are not quantized by a separate launch
    for m in (few, few + 6):
        gate, up = torch.randn(m, 512).to(BF16).split(256, dim=1)
        y = engine.gated(gate, up, layout, None, FP32)
        assert (y is None) == (m == few)
        if y is not None:
            product = quantize(torch.nn.functional.silu(gate.float()) * up.float(), engine._rounding(layout))
            expected = dequantize(product) @ dequantize(engine.restore(layout)).t()
            assert (
                y - expected
            ).norm() <= 1e-2 * expected.norm()  # its exponential differs from torch's, by a step here and there


@pytest.mark.parametrize("scheme", [ROW_ROW, BLOCK, Scheme(weight=ROW, activation=None)], ids=str)
@pytest.mark.parametrize("where", [HOPPER, AMPERE], ids=["hopper", "ampere"])
def test_the_engine_proves_itself(scheme: Scheme, where: Place) -> None:
    spec = MatmulSpec(scheme=scheme, n=4096, k=4096)
    assert proof.problem(OnCard(replace_library(where) if scheme is BLOCK else where), spec, CPU) == ""
    assert proof.problem(OnCard(replace_library(where)), replace(spec, experts=8), CPU) == ""


def test_kernels_that_fail_or_are_wrong_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ``auto`` chooses another engine if Triton has no C compiler, or the driver is too old."""

    def no_compiler(product: object) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    real, spec = dict(paths.PATHS), MatmulSpec(scheme=ROW_ROW, n=4096, k=4096)
    engine = lambda: OnCard(replace_library(HOPPER))  # noqa: E731  another one has not been proven yet
    monkeypatch.setattr(triton_engine, "PATHS", {**real, "tokens": no_compiler})
    failed = "its kernel tokens fails here: RuntimeError: Failed to find C compiler."
    assert proof.problem(engine(), spec, CPU).startswith(failed)
    monkeypatch.setattr(triton_engine, "PATHS", {**real, "rows": lambda product: real["rows"](product) + 1})
    assert proof.problem(engine(), spec, CPU).startswith("its kernel rows for 96 tokens gives ")


def test_scales_of_merged_projections() -> None:
    """Several tensors with one scale each in one weight: a scale for every 16 rows."""
    granularity = replace(ROW, rows=16)
    scheme = Scheme(weight=granularity, activation=ROW)
    weight = quantize(torch.randn(40, 64), granularity)
    engine = OnCard(replace_library(HOPPER))
    for m in (1, 20, 70):
        x = torch.randn(m, 64).to(BF16)
        layout = engine.prepare(weight, scheme)
        rounded = ReferenceEngine().rounded(x, replace(layout, scheme=engine.rounds(m, layout)))
        expected = rounded.float() @ dequantize(weight).t()
        assert (engine.linear(x, layout, None, FP32) - expected).norm() <= 1e-5 * expected.norm(), m


def replace_library(where):
    return replace(where, library=frozenset())


def test_static_scale_saturates() -> None:
    weight = ScaledTensor(torch.eye(32).to(torch.float8_e4m3fn), torch.ones(1, 1), TENSOR)
    scheme = Scheme(weight=TENSOR, activation=TENSOR, static=True)
    x = torch.zeros(70, 32)
    x[:, 0], x[:, 1] = 1.0, -2000.0
    for plan in (ROWS, Plan(path="library")):
        engine = Held(plan, rounds_to="as asked")
        y = engine.linear(x, engine.prepare(weight, scheme, input_scale=torch.tensor([2.0])), None, BF16)
        assert y[:, :2].tolist() == [[1.0, -896.0]] * 70


@pytest.mark.parametrize("plan", [VECTORS, TOKENS, ROWS], ids=lambda plan: plan.path)
def test_rows_far_apart(plan: Plan) -> None:
    """Offsets of 2**31 elements and more; the memory between the rows is never accessed."""
    stride = 2**31 + 16
    x = torch.empty(stride + 32, dtype=BF16).as_strided((2, 32), (stride, 1))
    x.copy_(torch.randint(-1, 2, (2, 32)))
    x[:, 0] = 448 if plan.path == "rows" else 0
    weight = ScaledTensor(torch.ones(4, 32).to(torch.float8_e4m3fn), torch.ones(4, 1), ROW)
    engine: Engine = Held(plan, rounds_to="rows")
    y = engine.linear(x, engine.prepare(weight, ROW_ROW), None, FP32)
    assert y.double().equal(x.double().sum(1, keepdim=True).expand(2, 4))


def test_no_tokens_no_features() -> None:
    engine = OnCard()
    for n, k in ((3, 0), (0, 5)):
        weight = ScaledTensor(torch.empty(n, k).to(torch.float8_e4m3fn), torch.ones(max(n, 1), 1), ROW)
        y = engine.linear(torch.ones(2, k), engine.prepare(weight, ROW_ROW), torch.arange(n).float(), FP32)
        assert y.equal(torch.arange(n).float().expand(2, n))
