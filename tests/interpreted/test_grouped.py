"""Grouped products with every distribution of tokens over experts."""

from __future__ import annotations

from dataclasses import replace

import conformance
import pytest
import torch
from stage import AMPERE, HOPPER, OnCard

from fp8gemm import BLOCK_128, GROUP_128, MX, ROW, MatmulSpec, ScaledTensor, Scheme, quantize
from fp8gemm.engines import PackedWeight
from fp8gemm.engines.reference import ReferenceEngine
from fp8gemm.engines.triton import engine as triton_engine
from fp8gemm.engines.triton.plan import GroupedPlan, grouped_plan, place

CPU = torch.device("cpu")
SCHEMES = {
    "row": Scheme(weight=ROW, activation=ROW),
    "block": Scheme(weight=BLOCK_128, activation=GROUP_128),
    "weight": Scheme(weight=ROW, activation=None),
    "mx": Scheme(weight=MX, activation=None),
}
# ends of three experts, number of tokens
SPREADS = {
    "even": ([10, 20, 30], 30),
    "empty ones": ([0, 25, 25], 25),
    "all in the last": ([0, 0, 40], 40),
    "tokens that no expert takes": ([3, 20, 21], 37),
    "no token for any expert": ([0, 0, 0], 5),
    "one token": ([0, 1, 1], 1),
}


def stack(scheme: Scheme, experts: int, n: int, k: int) -> ScaledTensor:
    spec = MatmulSpec(scheme=scheme, n=n, k=k)
    weights = [conformance._integer_weight(spec, CPU, zeros=True) for _ in range(experts)]
    return ScaledTensor(
        torch.stack([weight.data for weight in weights]),
        torch.stack([weight.scale for weight in weights]),
        scheme.weight,
    )


def expected(x: torch.Tensor, weight: ScaledTensor, ends: list[int], bias: torch.Tensor | None) -> torch.Tensor:
    y = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float64)
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        w = conformance._dense(ScaledTensor(weight.data[expert], weight.scale[expert], weight.granularity))
        y[start:end] = x[start:end].double() @ w.t() + (0 if bias is None else bias[expert].double())
    return y


def _scaled_grouped_mm(a, b, a_scale, b_scale, *, offs, out_dtype, use_fast_accum):
    """As torch's kernel on a GPU: rows past the last end are not written."""
    (tokens, k), (experts, _, n) = a.shape, b.shape
    assert a.is_contiguous()
    assert b.transpose(-2, -1).is_contiguous()
    assert (a_scale.shape, b_scale.shape) == ((tokens,), (experts, n))
    assert a_scale.is_contiguous()
    assert b_scale.is_contiguous()
    assert (n % 16, k % 16, offs.dtype) == (0, 0, torch.int32)
    y = torch.full((tokens, n), float("nan"), dtype=torch.float64)
    for expert, (start, end) in enumerate(zip([0, *offs.tolist()], offs.tolist(), strict=False)):
        y[start:end] = (a[start:end].double() * a_scale[start:end, None]) @ (b[expert].double() * b_scale[expert])
    return y.to(out_dtype)


@pytest.mark.parametrize("spread", list(SPREADS))
@pytest.mark.parametrize("static", [False, True])
def test_torchs_grouped_product(static: bool, spread: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After fp8gemm's quantization kernel, if each expert has many tokens."""
    monkeypatch.setattr(torch, "_scaled_grouped_mm", _scaled_grouped_mm)
    monkeypatch.setattr(
        triton_engine, "grouped_plan", lambda *args, **more: GroupedPlan(mode="library", quantize_first=True)
    )
    scheme, (ends, tokens) = replace(SCHEMES["row"], static=static), SPREADS[spread]
    weight = stack(scheme, 3, 32, 144)
    x = conformance._integer_tokens(tokens, MatmulSpec(scheme=scheme, n=32, k=144), scheme, CPU)
    bias = torch.randint(-3, 4, (3, 32)).to(torch.bfloat16)
    engine = OnCard(HOPPER)
    layout = engine.prepare_stack(weight, scheme)
    if static:
        layout, x = replace(layout, input_scale=torch.tensor(2.0)), x.clamp(-3, 3)
    y = engine.grouped(x, layout, torch.tensor(ends, dtype=torch.int32), bias, torch.bfloat16)
    found = expected(x, weight, ends, None)
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        found[start:end] = found[start:end].to(torch.bfloat16).double() + bias[expert].double()
    assert y.equal(found.to(torch.bfloat16))


def test_many_tokens_an_expert_are_torchs() -> None:
    many = {"n": 256, "k": 256, "tokens": 8 * 65, "experts": 8}
    assert grouped_plan(HOPPER, "row", **many).mode == "library"
    assert grouped_plan(HOPPER, "row", **{**many, "n": 250}).mode == "row"
    assert grouped_plan(HOPPER, "row", **{**many, "tokens": 8 * 64}).mode == "row"
    assert grouped_plan(HOPPER, "block", **many).mode == "block"
    assert grouped_plan(AMPERE, "weight", **many).mode == "weight"
    # torch's grouped kernels are made for Hopper, and trap on other GPUs.
    for capability in ((10, 0), (10, 3), (12, 0)):
        assert grouped_plan(place(capability), "row", **many).mode == "row"


@pytest.mark.parametrize("spread", list(SPREADS))
@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("where", [HOPPER, AMPERE], ids=lambda where: where.arch)
def test_exact_products(name: str, spread: str, where) -> None:
    scheme, (ends, tokens) = SCHEMES[name], SPREADS[spread]
    engine = OnCard(where)
    weight = stack(scheme, 3, 24, 144)
    x = conformance._integer_tokens(tokens, MatmulSpec(scheme=scheme, n=24, k=144), scheme, CPU)
    bias = torch.randint(-3, 4, (3, 24)).to(torch.bfloat16) if spread != "even" else None
    layout = engine.prepare_stack(weight, scheme)
    y = engine.grouped(x, layout, torch.tensor(ends, dtype=torch.int32), bias, torch.float32)
    assert y.double().equal(expected(x, weight, ends, bias))


PLANS = {
    "row": GroupedPlan(mode="row", quantize_first=True, block_m=16, block_n=16, block_k=64, warps=4, stages=1),
    "block inside": GroupedPlan(
        mode="block", quantize_first=False, block_m=16, block_n=32, block_k=128, warps=4, stages=1
    ),
    "block before": GroupedPlan(
        mode="block", quantize_first=True, block_m=32, block_n=16, block_k=128, warps=4, stages=1
    ),
}


@pytest.mark.parametrize("plan", list(PLANS))
def test_rounded_activations(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random operands, one output, and K with a remainder: the same as expert by expert with the reference."""
    monkeypatch.setattr(triton_engine, "grouped_plan", lambda *args, **more: PLANS[plan])
    scheme = SCHEMES["row" if plan == "row" else "block"]
    for n, k in ((1, 7), (40, 200)):
        weight = quantize(torch.randn(4, n, k), scheme.weight)
        x, ends = torch.randn(50, k).to(torch.bfloat16), torch.tensor([9, 9, 30, 44], dtype=torch.int32)
        bias = torch.randn(4, n)
        engine, reference = OnCard(), ReferenceEngine()
        y = engine.grouped(x, engine.prepare_stack(weight, scheme), ends, bias, torch.float32)
        right = reference.grouped(x, reference.prepare_stack(weight, scheme), ends, bias, torch.float32)
        assert (y - right).norm() <= 1e-5 * right.norm(), (n, k)
        assert not y[44:].any()


def test_more_tokens_than_a_tile_and_one_expert() -> None:
    scheme = SCHEMES["row"]
    engine = OnCard()
    weight = stack(scheme, 1, 24, 64)
    for tokens in (1, 16, 200):
        x = conformance._integer_tokens(tokens, MatmulSpec(scheme=scheme, n=24, k=64), scheme, CPU).to(torch.bfloat16)
        y = engine.grouped(
            x, engine.prepare_stack(weight, scheme), torch.tensor([tokens], dtype=torch.int32), None, torch.float32
        )
        assert y.double().equal(expected(x, weight, [tokens], None))


def test_no_token_at_all() -> None:
    engine, scheme = OnCard(), SCHEMES["row"]
    layout: PackedWeight = engine.prepare_stack(stack(scheme, 2, 8, 16), scheme)
    y = engine.grouped(torch.empty(0, 16), layout, torch.zeros(2, dtype=torch.int32), None, torch.float32)
    assert y.shape == (0, 8)


def test_nan_stays_with_its_token_and_expert() -> None:
    scheme = SCHEMES["weight"]
    engine = OnCard()
    weight = stack(scheme, 2, 8, 32)
    weight.data.view(torch.uint8)[1, 3, 31] = 0x7F
    x = torch.ones(6, 32, dtype=torch.bfloat16)
    x[1, 5] = float("nan")
    y = engine.grouped(
        x, engine.prepare_stack(weight, scheme), torch.tensor([3, 6], dtype=torch.int32), None, torch.float32
    )
    nan = torch.zeros(6, 8, dtype=torch.bool)
    nan[1], nan[3:, 3] = True, True
    assert y.isnan().equal(nan)


def test_granularity_of_merged_rows() -> None:
    scheme = Scheme(weight=replace(ROW, rows=8), activation=None)
    engine = OnCard()
    weight = stack(scheme, 2, 24, 32)
    x = torch.randint(-1, 2, (9, 32)).to(torch.bfloat16)
    y = engine.grouped(
        x, engine.prepare_stack(weight, scheme), torch.tensor([4, 9], dtype=torch.int32), None, torch.float32
    )
    assert y.double().equal(expected(x, weight, [4, 9], None))
