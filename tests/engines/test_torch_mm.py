"""What the torch engine asks of torch's FP8 products, and the CPUs on which it rejects them."""

from __future__ import annotations

from dataclasses import replace

import conformance
import pytest
import torch

from fp8gemm import ROW, Machine, quantize
from fp8gemm.engines import ENGINES, MatmulSpec, probe, scaled_mm, torch_mm
from fp8gemm.engines.torch_mm import TorchCpu
from fp8gemm.scaled import SCHEMES

BF16, F16 = torch.bfloat16, torch.float16
SPEC = MatmulSpec(scheme=SCHEMES["tensor"], n=64, k=64)


def test_a_product_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does where oneDNN is held down to fewer instructions than the CPU has."""

    def fails(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("could not create a primitive descriptor for the matmul primitive. Run workload with more")

    engine, machine = ENGINES["torch"], probe("cpu")  # before, as what it finds is kept
    monkeypatch.setattr(torch, "_scaled_mm", fails)
    found = engine.probe(torch.device("cpu"), machine)
    reason = "could not create a primitive descriptor for the matmul primitive"
    assert str(found) == f"torch._scaled_mm fails: {reason}"
    assert engine.rejects(SPEC, replace(machine, found={"torch": found})) == [
        f"torch._scaled_mm fails on this CPU: {reason}"
    ]
    assert engine.rejects(SPEC, replace(machine, found={"torch": TorchCpu()})) == []


def test_what_is_found_is_what_happens() -> None:
    codes, one = torch.ones(16, 16, dtype=torch.float8_e4m3fn), torch.ones(1)
    found = probe("cpu").facts("torch", TorchCpu)
    assert found is not None
    if found.error:
        with pytest.raises(RuntimeError):
            torch._scaled_mm(codes, codes.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    else:
        y = torch._scaled_mm(codes, codes.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        assert torch.equal(y, torch.full((16, 16), 16.0, dtype=torch.bfloat16))


def test_it_is_found_whatever_the_defaults() -> None:
    machine = probe("cpu")
    expected = ENGINES["torch"].probe(torch.device("cpu"), machine)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert ENGINES["torch"].probe(torch.device("cpu"), machine) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("version", "bias", "asked"), [((2, 13), False, BF16), ((2, 13), True, F16), ((2, 14), False, F16)]
)
def test_float16_is_asked_for_where_it_is_written(monkeypatch, version, bias, asked) -> None:
    """Before torch 2.14, CUDA's row-wise products without a bias write bfloat16's bits into a float16 tensor."""
    monkeypatch.setattr(scaled_mm, "TORCH", version)
    calls = []

    def product(xq, w, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        calls.append(out_dtype)
        return torch.ones(xq.shape[0], w.shape[1], dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    codes, ones = torch.zeros(4, 32).to(torch.float8_e4m3fn), torch.ones(4, 1)
    added = torch.zeros(16, dtype=F16) if bias else None
    y = scaled_mm.multiply(codes, codes.new_zeros(32, 16), ones, torch.ones(1, 16), added, F16, True)
    assert calls == [asked]
    assert y.dtype == F16
    assert scaled_mm.rows_dtype(torch.float32) == BF16
    assert scaled_mm.rows_dtype(BF16) == BF16


@pytest.mark.parametrize("scheme", ["row", "tensor"])
def test_scales_after_a_product_where_torch_has_none_by_row(monkeypatch, scheme: str) -> None:
    """As on Windows: row-wise products raise, and tensor-wise ones with scales of 1 serve them."""
    calls = []

    def product(xq, w, *, scale_a, scale_b, bias=None, out_dtype, use_fast_accum=False):
        if scale_a.numel() > 1 or scale_b.numel() > 1:
            raise RuntimeError("Rowwise scaling is not currently supported on your device")
        calls.append((scale_a.item(), scale_b.item(), out_dtype))
        y = (xq.double() * scale_a) @ (w.double() * scale_b)
        return (y if bias is None else y + bias).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    scaled_mm.multiplies_rows.cache_clear()
    assert not scaled_mm.multiplies_rows(torch.device("cpu"))
    scaled_mm.multiplies_rows.cache_clear()
    monkeypatch.setattr(torch_mm, "multiplies_rows", lambda device: False)
    monkeypatch.setattr(torch_mm, "on_accelerator", lambda tensor: True)
    engine, spec = torch_mm.TorchEngine(), replace(SPEC, scheme=SCHEMES[scheme], n=200, k=300)
    windows = Machine(device="cuda", name="RTX 4090", capability=(8, 9), system="win32")
    assert (engine.rejects(spec, windows) == []) == (scheme == "tensor"), "nobody has asked this machine"
    assert engine.rejects(spec, replace(windows, found={"torch": torch_mm.TorchGpu(rows=False)})) == []
    for check in conformance.CHECKS:
        check(engine, spec, torch.device("cpu"))
    assert calls
    if scheme == "row":
        assert set(calls) == {(1.0, 1.0, torch.float32)}
        packed = engine.prepare(quantize(torch.randn(16, 32), ROW), SCHEMES["row"])
        assert engine.kernel(4, packed, BF16) == "scaled_mm, then scales"
