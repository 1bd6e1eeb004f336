"""The torch engine's products with scales per tensor and per row, as an H100 and an RTX 4060 compute them.

``torch._scaled_mm`` is emulated by mmaemu: it refuses what torch 2.7 and cuBLASLt refuse (shapes, alignment, layouts,
output dtypes) and returns the bits of the card. With row scales it checks the call only; there the sums are still the
card's, and the scales are applied here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import conformance
import mmaemu
import pytest
import torch

from fp8gemm import ROW, SCHEMES, TENSOR, Machine, MatmulSpec, ScaledTensor, Scheme, quantize
from fp8gemm.engines import scaled_mm, torch_mm
from fp8gemm.engines.torch_mm import TorchEngine

CPU = torch.device("cpu")
CAPABILITIES = {"hopper-ws0": (9, 0), "ada-ws0": (8, 9)}
MACHINES = {name: Machine(device="cuda", capability=found) for name, found in CAPABILITIES.items()}


class Emulated(TorchEngine):
    """The engine as on a card, whose products are emulated."""

    def __init__(self, profile: str) -> None:
        self.profile = profile
        self.asked: list[dict[str, Any]] = []

    def scaled_mm(self, x: torch.Tensor, w: torch.Tensor, *, bias: None = None, **call: Any) -> torch.Tensor:
        self.asked.append({name: call[name] for name in ("out_dtype", "use_fast_accum")})
        if call["scale_a"].numel() == call["scale_b"].numel() == 1:
            return mmaemu.scaled_mm(x, w, **call, profile=self.profile)
        with pytest.raises(mmaemu.UnsupportedFeatureError, match="row-wise scales"):  # all that is refused is before
            mmaemu.scaled_mm(x, w, **call, profile=self.profile)
        sums = mmaemu.accumulate(x, w.t(), use_fast_accum=call["use_fast_accum"], profile=self.profile)
        return (sums * (call["scale_a"] * call["scale_b"])).to(call["out_dtype"])


@pytest.fixture(params=CAPABILITIES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    emulated = Emulated(request.param)
    monkeypatch.setattr(torch, "_scaled_mm", emulated.scaled_mm)
    monkeypatch.setattr(torch_mm, "on_accelerator", lambda tensor: True)
    monkeypatch.setattr(torch_mm, "multiplies_rows", lambda device: True)
    monkeypatch.setattr(scaled_mm, "TORCH", (2, 13))  # from 2.14 on, row-wise products return float16 too
    return emulated


@pytest.mark.parametrize("scheme", [s for s in conformance.SCHEMES if s.activation in (TENSOR, ROW)], ids=str)
def test_products_conform(engine: Emulated, scheme: Scheme) -> None:
    """The whole suite for its two small shapes, as the emulator computes some million products a second."""
    specs = [
        spec
        for spec in conformance.accepted_specs(engine, MACHINES[engine.profile])
        if spec.scheme == scheme and spec.n * spec.k <= 1000
    ]
    assert {spec.compute_dtype for spec in specs} == {torch.bfloat16, torch.float16, torch.float32}
    assert {(spec.n, spec.k) for spec in specs} == {(17, 33), (1, 7)}
    for spec in specs:
        for check in conformance.CHECKS:
            check(engine, spec, CPU)
    assert all(call["use_fast_accum"] for call in engine.asked)


def test_static_scales(engine: Emulated) -> None:
    scheme = Scheme(weight=TENSOR, activation=TENSOR, static=True)
    weight = quantize(torch.randn(48, 160), TENSOR)
    packed = engine.prepare(weight, scheme, input_scale=torch.tensor([2.0**-6]))
    x = torch.randn(5, 160, dtype=torch.bfloat16)
    x[0, 0] = 1000  # saturates
    expected = (64 * x.double()).clamp(-448, 448).to(torch.float8_e4m3fn).double() / 64
    expected = expected @ (weight.data.double() * weight.scale.double()).t()
    error = engine.linear(x, packed, None, torch.bfloat16).double() - expected
    assert error.norm() <= engine.tolerance * expected.norm()


@pytest.mark.parametrize("name", ["row", "tensor"])
def test_precise_is_what_the_card_does(engine: Emulated, name: str) -> None:
    """Sums of one sign, of which the accumulator loses most, so that float32 additions after 128 products show."""
    scheme = SCHEMES[name]
    weight = quantize(torch.randn(16, 2048).abs(), scheme.weight)
    x = torch.randn(4, 2048).abs().bfloat16()
    xq = quantize(x, scheme.activation)
    expected = (xq.data.double() * xq.scale.double()) @ (weight.data.double() * weight.scale.double()).t()
    packed = engine.prepare(weight, scheme)
    error = {}
    for accumulate in ("fast", "precise"):
        y = engine.linear(x, replace(packed, accumulate=accumulate), None, torch.bfloat16).double()
        error[accumulate] = ((y - expected).norm() / expected.norm()).item()
    assert error["precise"] <= 4e-3 < 1e-2 < error["fast"]


def test_a_card_refuses_what_is_not_padded(engine: Emulated) -> None:
    one, codes = torch.ones(1), torch.zeros(64, 64).to(torch.float8_e4m3fn)
    call = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    assert engine.scaled_mm(codes, codes.t(), **call).shape == (64, 64)
    for x, w, said in (
        (codes[:, :33].contiguous(), codes[:, :33].contiguous().t(), "divisible by 16"),
        (codes, codes[:17].t(), "divisible by 16"),
        (codes, codes, "row-major and column-major"),
        (codes.view(-1)[1:2049].view(32, 64), codes.t(), "16-byte aligned"),
    ):
        with pytest.raises(mmaemu.ReferenceRejectsError, match=said):
            engine.scaled_mm(x, w, **call)
    rows = call | {"scale_a": torch.ones(64, 1), "scale_b": torch.ones(1, 64), "out_dtype": torch.float32}
    with pytest.raises(mmaemu.ReferenceRejectsError, match="row-wise scaling"):
        mmaemu.scaled_mm(codes, codes.t(), **rows, profile=engine.profile)
    spec = MatmulSpec(scheme=SCHEMES["row"], n=64, k=64)
    packed = engine.prepare(ScaledTensor(codes, torch.ones(64, 1), ROW), spec.scheme)
    engine.linear(torch.zeros(3, 64), packed, None, torch.float32)
    assert engine.asked[-1]["out_dtype"] == torch.bfloat16
