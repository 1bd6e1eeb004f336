"""Every engine that can run here passes the conformance suite, and broken engines fail it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import conformance
import pytest
import torch

from fp8gemm import ENGINES, SCHEMES, Machine, MatmulSpec, ScaledTensor, Scheme, dequantize, native, probe, quantize
from fp8gemm.engines import torch_mm
from fp8gemm.engines.reference import ReferenceEngine
from fp8gemm.engines.scaled_mm import from_fnuz, to_fnuz
from fp8gemm.engines.torch_mm import TorchEngine

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(ENGINES))
def test_engine_conforms(name: str, device: str, required_engines: list[str]) -> None:
    machine = probe(device)
    engine = ENGINES[name]
    specs = [MatmulSpec(scheme=scheme, n=256, k=384) for scheme in conformance.SCHEMES]
    reasons = sorted({reason for spec in specs for reason in engine.rejects(spec, machine)})
    if conformance.check(engine, machine, torch.device(device)) == 0:
        assert reasons, f"{name} accepts nothing on {device} and gives no reason"
        message = f"{name} on {device}: {'; '.join(reasons)}"
        assert name not in required_engines, message
        pytest.skip(message)


class DroppedBias(ReferenceEngine):
    def linear(self, x, weight, bias, out_dtype):
        return super().linear(x, weight, None, out_dtype)


class TransposedScale(ReferenceEngine):
    def prepare(self, weight, scheme, *, input_scale=None):
        packed = super().prepare(weight, scheme, input_scale=input_scale)
        rows, cols = weight.scale.shape
        return replace(packed, scale=weight.scale.t().reshape(rows, cols))


class ShiftedScale(ReferenceEngine):
    def linear(self, x, weight, bias, out_dtype):
        return super().linear(x, replace(weight, scale=weight.scale.roll(1, dims=0)), bias, out_dtype)


class IgnoredTail(ReferenceEngine):
    def linear(self, x, weight, bias, out_dtype):
        x = x.clone()
        x[:, weight.k - weight.k % 16 :] = 0
        return super().linear(x, weight, bias, out_dtype)


class NarrowAccumulator(ReferenceEngine):
    def linear(self, x, weight, bias, out_dtype):
        w = ScaledTensor(weight.data, weight.scale, weight.scheme.weight)
        wide, dense = self.rounded(x, weight).to(torch.float32), conformance._dense(w).float()
        y = torch.zeros(x.shape[0], weight.n)
        for start in range(0, weight.k, 16):
            part = wide[:, start : start + 16] @ dense[:, start : start + 16].t()
            y = (y + part).to(torch.float16).to(torch.float32)
        return (y if bias is None else y + bias.to(torch.float32)).to(out_dtype)


class UnwrittenRow(ReferenceEngine):
    def linear(self, x, weight, bias, out_dtype):
        y = super().linear(x, weight, bias, out_dtype)
        y[64:] = 0
        return y


class OneScaleOff(ReferenceEngine):
    def linear(self, x, weight, bias, out_dtype):
        scale = weight.scale.clone()
        scale[-1, -1] *= 1.02
        return super().linear(x, replace(weight, scale=scale), bias, out_dtype)


class LostNaN(ReferenceEngine):
    def linear(self, x, weight, bias, out_dtype):
        return super().linear(x, weight, bias, out_dtype).nan_to_num()


class ChangedBytes(ReferenceEngine):
    def restore(self, packed):
        code = packed.data.view(torch.uint8) & 0xFE
        return ScaledTensor(code.view(packed.data.dtype), packed.scale, packed.scheme.weight)


BROKEN = [
    DroppedBias,
    TransposedScale,
    ShiftedScale,
    IgnoredTail,
    NarrowAccumulator,
    UnwrittenRow,
    OneScaleOff,
    LostNaN,
    ChangedBytes,
]


@pytest.mark.parametrize("broken", BROKEN)
def test_suite_catches(broken: type[ReferenceEngine]) -> None:
    with pytest.raises(AssertionError):
        conformance.check(broken(), probe("cpu"), torch.device("cpu"))


class GroupedUnwrittenTail(ReferenceEngine):
    """Does not write rows past the last end, as torch's kernel does not."""

    def grouped(self, x, weight, ends, bias, out_dtype):
        y = super().grouped(x, weight, ends, bias, out_dtype)
        y[int(ends[-1]) :] = 7
        return y


class GroupedNeighbour(ReferenceEngine):
    """Assigns the first token of each expert to the previous expert."""

    def grouped(self, x, weight, ends, bias, out_dtype):
        return super().grouped(x, weight, (ends + 1).clamp(max=int(ends[-1])), bias, out_dtype)


class GroupedBiasOfFirst(ReferenceEngine):
    def grouped(self, x, weight, ends, bias, out_dtype):
        bias = None if bias is None else bias[:1].expand_as(bias)
        return super().grouped(x, weight, ends, bias, out_dtype)


class GroupedScaleOfFirst(ReferenceEngine):
    def prepare_stack(self, weight, scheme):
        return replace(super().prepare_stack(weight, scheme), scale=weight.scale[:1].expand_as(weight.scale)).split()


@pytest.mark.parametrize("broken", [GroupedUnwrittenTail, GroupedNeighbour, GroupedBiasOfFirst, GroupedScaleOfFirst])
def test_suite_catches_grouped(broken: type[ReferenceEngine]) -> None:
    engine = broken()
    specs = list(conformance.accepted_specs(engine, probe("cpu"), experts=conformance.EXPERTS))
    with pytest.raises(AssertionError):
        _check_grouped(engine, specs)


def _check_grouped(engine: ReferenceEngine, specs: list[MatmulSpec]) -> None:
    for spec in specs:
        conformance.grouped_products(engine, spec, torch.device("cpu"))


@pytest.mark.parametrize("check", conformance.CHECKS)
def test_no_check_is_idle(check) -> None:
    """Each check is the only one to catch some defect."""
    specs = list(conformance.accepted_specs(ReferenceEngine(), probe("cpu")))

    def caught(engine: ReferenceEngine) -> bool:
        try:
            for spec in specs:
                check(engine, spec, torch.device("cpu"))
        except AssertionError:
            return True
        return False

    own = {conformance.any_row_stride: IgnoresStride, conformance.float64_products: NarrowFloat64}.get(check)
    assert any(caught(broken()) for broken in ([own] if own else BROKEN))


class IgnoresStride(ReferenceEngine):
    """Reads rows as if they were contiguous, like a kernel that takes only a pointer."""

    def linear(self, x, weight, bias, out_dtype):
        packed = torch.as_strided(x, x.shape, (x.shape[1], 1))
        return super().linear(packed, weight, bias, out_dtype)


class NarrowFloat64(ReferenceEngine):
    """Dequantizes in float32 whatever the dtype of the activations."""

    def linear(self, x, weight, bias, out_dtype):
        w = dequantize(ScaledTensor(weight.data, weight.scale, weight.scheme.weight), torch.float32)
        return (self.rounded(x, weight) @ w.to(torch.promote_types(x.dtype, torch.float32)).t()).to(out_dtype)


def test_static_activation_scale() -> None:
    """With a static scale, values beyond its range saturate, in every engine that quantizes activations."""
    weight = ScaledTensor(torch.eye(32).to(torch.float8_e4m3fn), torch.ones(1, 1), conformance.TENSOR)
    scheme = Scheme(weight=conformance.TENSOR, activation=conformance.TENSOR, static=True)
    x = torch.tensor([[1.0, -2000.0] + [0.0] * 30])
    scale = torch.tensor([2.0])
    machine, spec = probe("cpu"), MatmulSpec(scheme=scheme, n=32, k=32)
    for name in ("reference", "torch"):
        if ENGINES[name].rejects(spec, machine):
            assert name == "torch"
            continue
        y = ENGINES[name].linear(x, ENGINES[name].prepare(weight, scheme, input_scale=scale), None, torch.float32)
        assert y[0, :2].tolist() == [1.0, -896.0], name


@pytest.mark.skipif(native.loaded() is None, reason="plain torch looks for NaN codes whenever it prepares a weight")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_nan_that_is_written_after_the_first_product_is_seen(dtype: torch.dtype) -> None:
    """The CPU engine looks for NaN codes when it prepares a weight; a compiled graph may write some later."""
    engine = ENGINES["cpu"]
    weight = quantize(torch.randn(40, 96), conformance.ROW)
    for m in (1, 12):
        packed = engine.prepare(weight, Scheme(weight=conformance.ROW, activation=None))
        x = torch.randn(m, 96).to(dtype)
        bound = engine.bind(x, packed, None, dtype)
        before = engine.linear(x, packed, None, dtype)
        assert bound is not None
        assert bound(x).equal(before)
        code = packed.data.view(torch.uint8)[7, 50].item()
        packed.data.view(torch.uint8)[7, 50] = 0x7F
        for y in (engine.linear(x, packed, None, dtype), bound(x)):
            assert y[:, 7].isnan().all()
            assert y.isnan().sum() == m
        packed.data.view(torch.uint8)[7, 50] = code


def test_packed_weights_name_their_engine() -> None:
    weight = ScaledTensor(torch.ones(32, 32).to(torch.float8_e4m3fn), torch.ones(1, 1), conformance.TENSOR)
    scheme = Scheme(weight=conformance.TENSOR, activation=None)
    machine = probe("cpu")
    for name, engine in ENGINES.items():
        if not engine.rejects(MatmulSpec(scheme=scheme, n=32, k=32), machine):
            packed = engine.prepare(weight, scheme)
            assert packed.engine == name
            assert (packed.n, packed.k) == (32, 32)


CPU = torch.device("cpu")
H100 = Machine(device="cuda", capability=(9, 0), cuda_version=(13, 0))
MI300 = Machine(device="rocm", features=frozenset({"gfx942"}))
scaled_mm, _scaled_mm = torch.nn.functional.scaled_mm, torch._scaled_mm


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """The properties of an operand that torch's own checks see."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def cublaslt_blocks(x, w, *, scale_a, scale_b, output_dtype, **recipes):
    """``scaled_mm`` of 1x128 by 128x128 blocks: torch's own check of shapes and strides, then the exact product."""
    assert x.shape[0] % 4 == 0  # required by cuBLASLt, and not checked by torch (vllm#49932)
    scales = {"scale_a": on_meta(scale_a), "scale_b": on_meta(scale_b)}
    shape = scaled_mm(on_meta(x), on_meta(w), **scales, output_dtype=output_dtype, **recipes).shape
    k, n = w.shape
    dense = w.double() * scale_b.double().repeat_interleave(128, 0)[:k].repeat_interleave(128, 1)[:, :n]
    y = (x.double() * scale_a.double().repeat_interleave(128, 1)[:, :k]) @ dense
    assert y.shape == shape
    return y.to(output_dtype)


def hipblaslt(x, w, *, scale_a, scale_b, out_dtype, use_fast_accum, bias=None):
    """``_scaled_mm`` on gfx942: torch's own checks, and ScaledBlas.cpp's, then the exact product."""
    assert x.dtype == w.dtype == torch.float8_e4m3fnuz
    by_row = scale_a.numel() > 1 or scale_b.numel() > 1
    assert not by_row or out_dtype == torch.bfloat16, "hipblaslt rowwise _scaled_mm only supports BFloat16 output"
    scales = {"scale_a": on_meta(scale_a), "scale_b": on_meta(scale_b)}
    shape = _scaled_mm(on_meta(x), on_meta(w), **scales, out_dtype=out_dtype, use_fast_accum=use_fast_accum).shape
    y = (x.double() * scale_a.double()) @ (w.double() * scale_b.double())
    assert y.shape == shape
    return y.to(out_dtype)


@pytest.fixture
def gfx942(monkeypatch: pytest.MonkeyPatch) -> TorchEngine:
    monkeypatch.setattr(torch_mm, "takes_fnuz", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", hipblaslt)
    return TorchEngine()


def test_torch_blocks_conform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for N and K that are not multiples: torch 2.13's check refuses 2112 = 16.5 blocks of 128 unless padded."""
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", cublaslt_blocks)
    specs = [spec for spec in conformance.accepted_specs(TorchEngine(), H100) if spec.scheme == SCHEMES["block"]]
    assert len(specs) == 3 * len(conformance.SHAPES)
    for spec in specs:
        for part in conformance.CHECKS:
            part(TorchEngine(), spec, CPU)


@pytest.mark.parametrize("shape", [(2112, 7168), (2112, 7100), (576, 7168), (100, 200), (128, 128)], ids=str)
def test_torch_takes_ragged_blocks(shape: tuple[int, int]) -> None:
    """torch's own shape check accepts the engine's operands at realistic sizes."""
    n, k = shape
    codes = torch.empty(n, k, dtype=torch.float8_e4m3fn, device="meta")
    scale = torch.empty(conformance.BLOCK_128.scale_shape((n, k)), device="meta")
    engine = TorchEngine()
    weight = engine.prepare(ScaledTensor(codes, scale, conformance.BLOCK_128), SCHEMES["block"])
    for m in (1, 8, 33):
        y = engine.linear(torch.empty(m, k, dtype=torch.bfloat16, device="meta"), weight, None, torch.bfloat16)
        assert y.shape == (m, n)


def test_fnuz_codes() -> None:
    """All 256 codes: half the value, NaN stays NaN; the same bytes back, except for the signs of zero and NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    fnuz = to_fnuz(codes)
    assert fnuz.dtype == torch.float8_e4m3fnuz
    assert torch.equal(2 * fnuz.double().nan_to_num(1e9), codes.double().nan_to_num(2e9))
    assert int((fnuz.view(torch.uint8) == 0x80).sum()) == 2
    expected = torch.arange(256, dtype=torch.uint8)
    expected[0x80], expected[0xFF] = 0, 0x7F
    assert from_fnuz(fnuz).view(torch.uint8).equal(expected)


def test_gfx942_conforms(gfx942: TorchEngine) -> None:
    """The same products as elsewhere, from operands that were quantized as elsewhere."""
    specs = list(conformance.accepted_specs(gfx942, MI300))
    assert {spec.scheme.weight for spec in specs} == {conformance.TENSOR, conformance.ROW}
    for spec in specs:
        for part in conformance.CHECKS:
            if part is not conformance.exact_restoration:
                part(gfx942, spec, CPU)


@pytest.mark.parametrize("name", ["row", "tensor"])
def test_gfx942_gives_the_weight_back(gfx942: TorchEngine, name: str) -> None:
    """Values and scales are exact at any scale; the doubled scale is a copy."""
    scheme = SCHEMES[name]
    code = torch.arange(256, dtype=torch.uint8).repeat(33, 2)[:, :500]
    scale = torch.full(scheme.weight.scale_shape(code.shape), 3e38)
    scale[0] = 2.0**-149
    packed = gfx942.prepare(ScaledTensor(code.view(torch.float8_e4m3fn), scale, scheme.weight), scheme)
    assert packed.data.dtype == torch.float8_e4m3fnuz
    # Created as by a layer: from data and scale alone.
    restored = gfx942.restore(replace(packed, extra={}))
    changed = restored.data.view(torch.uint8) != code
    assert set(code[changed].tolist()) == {0x80, 0xFF}
    assert torch.equal(restored.data.double().nan_to_num(1e9), code.view(torch.float8_e4m3fn).double().nan_to_num(1e9))
    assert restored.scale.equal(scale)


def test_gfx942_saturates_static_activations(gfx942: TorchEngine) -> None:
    weight = ScaledTensor(torch.eye(32).to(torch.float8_e4m3fn), torch.ones(1, 1), conformance.TENSOR)
    scheme = Scheme(weight=conformance.TENSOR, activation=conformance.TENSOR, static=True)
    packed = gfx942.prepare(weight, scheme, input_scale=torch.tensor([2.0]))
    x = torch.tensor([[1.0, -2000.0, 3000.0] + [0.0] * 29])
    assert gfx942.linear(x, packed, None, torch.float32)[0, :3].tolist() == [1.0, -896.0, 896.0]


@pytest.mark.parametrize("check", [conformance.exact_products, conformance.special_values])
def test_suite_catches_a_missing_conversion(
    gfx942: TorchEngine, monkeypatch: pytest.MonkeyPatch, check: Callable[..., None]
) -> None:
    """If the bytes are used unchanged, NaN becomes 240, and -0 becomes NaN."""
    monkeypatch.setattr(torch_mm, "to_fnuz", lambda data: data.view(torch.float8_e4m3fnuz))
    spec = MatmulSpec(scheme=SCHEMES["row"], n=130, k=200, compute_dtype=torch.float32)
    with pytest.raises(AssertionError):
        check(gfx942, spec, CPU)
