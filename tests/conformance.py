"""The conformance suite for engines. Each check takes an engine and a device, and fails by an assertion."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from fp8gemm import BLOCK_128, GROUP_128, MX, ROW, TENSOR, MatmulSpec, ScaledTensor, Scheme, UnsupportedError, quantize
from fp8gemm.engines import Engine, Machine, PackedWeight
from fp8gemm.engines.reference import ReferenceEngine

SCHEMES = [
    Scheme(weight=TENSOR, activation=TENSOR),
    Scheme(weight=ROW, activation=ROW),
    Scheme(weight=TENSOR, activation=ROW),
    Scheme(weight=BLOCK_128, activation=GROUP_128),
    Scheme(weight=TENSOR, activation=None),
    Scheme(weight=ROW, activation=None),
    Scheme(weight=BLOCK_128, activation=None),
    Scheme(weight=GROUP_128, activation=None),
    Scheme(weight=MX, activation=None, scale_format="ue8m0"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# Aligned; unaligned in both dimensions; narrower than any tile; a single output.
SHAPES = [(256, 384), (130, 200), (17, 33), (1, 7)]
TOKENS = [0, 1, 2, 3, 5, 17, 70]


def accepted_specs(engine: Engine, machine: Machine, *, experts: int = 0) -> Iterator[MatmulSpec]:
    """Every problem of this suite that the engine does not reject."""
    for scheme, dtype, (n, k) in itertools.product(SCHEMES, DTYPES, SHAPES):
        spec = MatmulSpec(scheme=scheme, n=n, k=k, compute_dtype=dtype, experts=experts)
        if not engine.rejects(spec, machine):
            yield spec


def check(engine: Engine, machine: Machine, device: torch.device) -> int:
    """Runs all checks on all problems that the engine accepts; returns the number of those problems."""
    specs = list(accepted_specs(engine, machine))
    stacks = [stack for stack in accepted_specs(engine, machine, experts=EXPERTS) if stack.n > 1]
    for spec in specs:
        for part in CHECKS:
            part(engine, spec, device)
    for spec in stacks:
        grouped_products(engine, spec, device)
    return len(specs) + len(stacks)


def exact_products(engine: Engine, spec: MatmulSpec, device: torch.device) -> None:
    """Small integers times powers of two have exact products, whatever the rounding: bitwise equality."""
    weight, packed = _packed(engine, spec, lambda zeros: _integer_weight(spec, device, zeros=zeros))
    for m, with_bias in itertools.product(TOKENS, (True, False)):
        x = _integer_tokens(m, spec, packed.scheme, device)
        bias = torch.randint(-3, 4, (spec.n,), device=device).to(spec.compute_dtype) if with_bias else None
        y = engine.linear(x, packed, bias, spec.compute_dtype)
        expected = x.double() @ _dense(weight).t()
        if bias is not None:
            expected = expected + bias.double()
        assert y.shape == (m, spec.n), f"{spec}, M={m}: shape {tuple(y.shape)}"
        assert y.dtype == spec.compute_dtype, f"{spec}: {y.dtype}"
        assert y.double().equal(expected), f"{spec}, M={m}, bias={with_bias}: not the exact product"


def accurate_products(engine: Engine, spec: MatmulSpec, device: torch.device) -> None:
    """Random operands: the error of the whole, of each token and of each output is that of rounding the output."""
    weight = quantize(
        torch.randn(spec.n, spec.k, device=device) * torch.rand(spec.n, 1, device=device),
        spec.scheme.weight,
        scale_format=spec.scheme.scale_format,
    )
    packed = engine.prepare(weight, spec.scheme)
    bias = torch.randn(spec.n, device=device).to(spec.compute_dtype)
    x = torch.randn(33, spec.k, device=device).to(spec.compute_dtype)
    rounded = _rounded(x, replace(packed, scheme=engine.rounds(x.shape[0], packed, x.dtype)), weight)
    expected = rounded @ _dense(weight).t() + bias.double()
    # The expected size of a sum with random signs, which unlike the sum cannot cancel to zero; or the sum if larger.
    typical = (rounded.square() @ _dense(weight).square().t() + bias.double().square()).sqrt().maximum(expected.abs())
    error = engine.linear(x, packed, bias, spec.compute_dtype).double() - expected
    for dim, what in (((0, 1), "the whole"), (1, "a token"), (0, "an output")):
        relative = (error.norm(dim=dim) / typical.norm(dim=dim)).max()
        allowed = engine.tolerance * (1 if dim == (0, 1) else 2)
        assert relative <= allowed, f"{spec}: {what} is off by {relative:.2e}"


def wide_accumulation(engine: Engine, spec: MatmulSpec, device: torch.device) -> None:
    """Partial sums that need 13 bits and cancel: an accumulator in bfloat16 or float16 loses the remainder, while the
    tensor cores' 14 bits keep it."""
    k = 4096
    half = torch.ones(1, k // 2, device=device)
    odd = torch.cat([3 * half, -3 * half], dim=1)
    odd[:, k // 2 - 1] = 1
    # Activations are 256, a power of two, because a 448 in each group makes their scale 1: as 448 = 7 * 64, it has a
    # multiple of four for its weight, and costs no further bits.
    odd[:, : k // 2 : 128], odd[:, k // 2 :: 128] = 4, -4
    scheme = spec.scheme
    weight = ScaledTensor(
        odd.expand(16, k).to(torch.float8_e4m3fn).contiguous(),
        torch.ones(scheme.weight.scale_shape((16, k)), device=device),
        scheme.weight,
    )
    x = torch.full((3, k), 256.0 if scheme.activation else 1.0, device=device)
    if scheme.activation:
        x[:, ::128] = 448.0
    y = engine.linear(x.to(spec.compute_dtype), engine.prepare(weight, scheme), None, spec.compute_dtype)
    expected = x.double() @ _dense(weight).t()
    assert y.double().equal(expected), f"{spec}: partial sums were rounded, {y[0, 0]} for {expected[0, 0]}"


def special_values(engine: Engine, spec: MatmulSpec, device: torch.device) -> None:
    """Tokens of zeros give the bias; NaN and infinity affect only their own token or output; outliers affect no
    other."""
    weight = quantize(torch.randn(spec.n, spec.k, device=device), spec.scheme.weight)
    bias = torch.randn(spec.n, device=device).to(spec.compute_dtype)
    x = torch.randn(5, spec.k, device=device).to(spec.compute_dtype)
    x[0], x[1, 0], x[2, 0], x[3, 0] = 0, float("nan"), float("inf"), 6.5e4
    packed = engine.prepare(weight, spec.scheme)
    y = engine.linear(x, packed, bias, spec.compute_dtype)
    assert y[0].equal(bias), f"{spec}: a token of zeros does not give the bias"
    assert y[1].isnan().all(), f"{spec}: NaN in a token was lost"
    assert not y[2].isfinite().any(), f"{spec}: infinity in a token was lost"
    if spec.scheme.activation != TENSOR:
        clean = engine.linear(x[4:], packed, bias, spec.compute_dtype)
        change = (y[4:].double() - clean.double()).norm() / (clean.double() - bias.double()).norm().maximum(bias.norm())
        assert change <= engine.tolerance, f"{spec}: a token is hurt by its neighbours, {change:.2e}"
    code = weight.data.view(torch.uint8).clone()
    code[0, spec.k - 1] = 0xFF
    spoiled = ScaledTensor(code.view(weight.data.dtype), weight.scale, weight.granularity)
    y = engine.linear(x[4:], engine.prepare(spoiled, spec.scheme), bias, spec.compute_dtype)
    assert y[:, 0].isnan().all(), f"{spec}: NaN in a weight was lost"
    assert y[:, 1:].isfinite().all(), f"{spec}: NaN in a weight spoils other outputs"


def exact_restoration(engine: Engine, spec: MatmulSpec, device: torch.device) -> None:
    """restore returns the bytes that prepare was given: all 256 codes, including NaN."""

    def codes(zeros: bool) -> ScaledTensor:
        code = torch.randint(0, 256, (spec.n, spec.k), dtype=torch.uint8, device=device)
        code = code if zeros else code | 8
        scale = torch.rand(spec.scheme.weight.scale_shape(code.shape), device=device)
        return ScaledTensor(code.view(torch.float8_e4m3fn), scale, spec.scheme.weight)

    weight, packed = _packed(engine, spec, codes)
    restored = engine.restore(packed)
    assert restored.data.view(torch.uint8).equal(weight.data.view(torch.uint8)), f"{spec}: bytes changed"
    assert restored.scale.equal(weight.scale), f"{spec}: scales changed"
    assert restored.granularity == spec.scheme.weight


def any_row_stride(engine: Engine, spec: MatmulSpec, device: torch.device) -> None:
    """Tokens in slices of a wider tensor, whose rows start at any address.

    The inputs make the product exact, as a library may choose another kernel and order of summation for unaligned rows.
    """
    weight, packed = _packed(engine, spec, lambda zeros: _integer_weight(spec, device, zeros=zeros))
    tokens = _integer_tokens(6, spec, packed.scheme, device)
    wide = torch.nn.functional.pad(tokens, (0, 5), value=3.0)
    y = engine.linear(wide[:, : spec.k], packed, None, spec.compute_dtype)
    assert y.double().equal(tokens.double() @ _dense(weight).t()), f"{spec}: the row stride changes the answer"


def float64_products(engine: Engine, spec: MatmulSpec, device: torch.device) -> None:
    """Operands with more than float32's 24 bits: float64 activations are float64 throughout.

    A sum of K products errs by at most K units of 2**-53 of the sum of magnitudes, in any order.
    """
    if spec.compute_dtype != torch.float64:
        return
    weight = quantize(torch.randn(spec.n, spec.k, device=device), spec.scheme.weight)
    packed = engine.prepare(weight, spec.scheme)
    x = torch.randn(3, spec.k, device=device, dtype=torch.float64)
    rounded = _rounded(x, replace(packed, scheme=engine.rounds(x.shape[0], packed, x.dtype)), weight)
    expected = rounded @ _dense(weight).t()
    allowed = (spec.k + 2) * 2.0**-53 * (rounded.abs() @ _dense(weight).abs().t())
    error = (engine.linear(x, packed, None, torch.float64) - expected).abs()
    assert (error <= allowed).all(), f"{spec}: not computed in float64, off by {(error / allowed).max():.1e} bounds"


def grouped_products(engine: Engine, spec: MatmulSpec, device: torch.device) -> None:
    """Tokens sorted by expert: none, all for one, one, uneven, and some of absent experts; bitwise on integers."""
    stack, packed = _packed(engine, spec, lambda zeros: _integer_stack(spec, device, zeros=zeros))
    bias = torch.randint(-3, 4, (EXPERTS, spec.n), device=device).to(spec.compute_dtype)
    for counts in ROUTINGS:
        ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
        absent = 3
        x = _integer_tokens(sum(counts) + absent, spec, packed.scheme, device)
        for own in (bias, None):
            y = engine.grouped(x, packed, ends, own, spec.compute_dtype)
            expected = torch.zeros(x.shape[0], spec.n, dtype=torch.float64, device=device)
            start = 0
            for expert, count in enumerate(counts):
                w = _dense(ScaledTensor(stack.data[expert], stack.scale[expert], stack.granularity))
                product = x[start : start + count].double() @ w.t()
                expected[start : start + count] = product if own is None else product + own[expert].double()
                start += count
            assert y.dtype == spec.compute_dtype
            assert y.double().equal(expected), f"{spec}, tokens {counts}, bias={own is not None}: not the exact product"
    restored = engine.restore_stack(packed)
    assert restored.data.view(torch.uint8).equal(stack.data.view(torch.uint8)), f"{spec}: bytes of the stack changed"
    assert restored.scale.equal(stack.scale), f"{spec}: scales of the stack changed"


EXPERTS = 5
ROUTINGS = [(2, 3, 1, 4, 2), (0, 0, 7, 0, 0), (0, 0, 0, 0, 0), (0, 1, 0, 0, 0), (5, 0, 0, 0, 1), (1, 0, 40, 3, 0)]
CHECKS: list[Callable[[Engine, MatmulSpec, torch.device], None]] = [
    exact_products,
    accurate_products,
    wide_accumulation,
    special_values,
    exact_restoration,
    any_row_stride,
    float64_products,
]


def _packed(
    engine: Engine, spec: MatmulSpec, weight: Callable[[bool], ScaledTensor]
) -> tuple[ScaledTensor, PackedWeight]:
    """A weight with zeros and subnormals among its codes, or, for an engine that refuses those, one without."""
    prepare = engine.prepare_stack if spec.experts else engine.prepare
    with_zeros = weight(True)
    try:
        return with_zeros, prepare(with_zeros, spec.scheme)
    except UnsupportedError:
        without = weight(False)
        return without, prepare(without, spec.scheme)


def _integer_stack(spec: MatmulSpec, device: torch.device, *, zeros: bool) -> ScaledTensor:
    weights = [_integer_weight(spec, device, zeros=zeros) for _ in range(EXPERTS)]
    data, scale = (torch.stack(tensors) for tensors in zip(*((w.data, w.scale) for w in weights), strict=True))
    return ScaledTensor(data, scale, spec.scheme.weight)


def _integer_weight(spec: MatmulSpec, device: torch.device, *, zeros: bool) -> ScaledTensor:
    """Codes of -1, 1 and perhaps 0 with scales of 1 and 2; zero where ``_integer_tokens`` fixes activation scales."""
    data = 2 * torch.randint(0, 2, (spec.n, spec.k), device=device).float() - 1
    if zeros:
        data *= torch.randint(0, 2, data.shape, device=device)
        data[:, ::32] = 0
    grid = spec.scheme.weight.scale_shape(data.shape)
    scale = 2.0 ** torch.randint(0, 2, grid, device=device).float()
    return ScaledTensor(data.to(torch.float8_e4m3fn), scale, spec.scheme.weight)


def _integer_tokens(m: int, spec: MatmulSpec, effective: Scheme, device: torch.device) -> torch.Tensor:
    """-1, 0 and 1; for engines that quantize activations also a 448 in every group, so that scales are exactly 1."""
    x = torch.randint(-1, 2, (m, spec.k), device=device)
    if effective.activation is not None:
        x[:, ::32] = 448
    return x.to(spec.compute_dtype)


def _dense(weight: ScaledTensor) -> torch.Tensor:
    """The dequantized weight in float64, computed independently of fp8gemm's dequantize."""
    rows, cols = weight.granularity.block(weight.shape)
    n, k = weight.shape
    i = torch.arange(n, device=weight.device)[:, None] // rows
    j = torch.arange(k, device=weight.device)[None, :] // cols
    return weight.data.to(torch.float64) * weight.scale.double()[i, j]


def _rounded(x: torch.Tensor, packed: PackedWeight, weight: ScaledTensor) -> torch.Tensor:
    """The tokens in float64 after the quantization that the engine's ``rounds`` returns."""
    return ReferenceEngine().rounded(x, replace(packed, data=weight.data, scale=weight.scale, extra={})).double()
