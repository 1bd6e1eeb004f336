"""Every engine passes the conformance suite where it can run; broken ones are caught."""

from __future__ import annotations

from dataclasses import replace

import conformance
import pytest
import torch

from fp8gemm import ENGINES, MatmulSpec, ScaledTensor, Scheme, probe
from fp8gemm.engines.reference import ReferenceEngine

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
        prepared = super().prepare(weight, scheme, input_scale=input_scale)
        rows, cols = weight.scale.shape
        return replace(prepared, scale=weight.scale.t().reshape(rows, cols))


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
    def restore(self, prepared):
        code = prepared.data.view(torch.uint8) & 0xFE
        return ScaledTensor(code.view(prepared.data.dtype), prepared.scale, prepared.scheme.weight)


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
    """Leaves rows past the last end as they came, as torch's kernel does."""

    def grouped(self, x, weight, ends, bias, out_dtype):
        y = super().grouped(x, weight, ends, bias, out_dtype)
        y[int(ends[-1]) :] = 7
        return y


class GroupedNeighbour(ReferenceEngine):
    """Gives the first token of each expert to the expert before it."""

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
    """Each check catches some defect by itself."""
    specs = list(conformance.accepted_specs(ReferenceEngine(), probe("cpu")))

    def caught(engine: ReferenceEngine) -> bool:
        try:
            for spec in specs:
                check(engine, spec, torch.device("cpu"))
        except AssertionError:
            return True
        return False

    if check is conformance.any_row_stride:
        assert caught(IgnoresStride())
    else:
        assert any(caught(broken()) for broken in BROKEN)


class IgnoresStride(ReferenceEngine):
    """Reads rows as if they were packed, as a kernel that takes only a pointer does."""

    def linear(self, x, weight, bias, out_dtype):
        packed = torch.as_strided(x, x.shape, (x.shape[1], 1))
        return super().linear(packed, weight, bias, out_dtype)


def test_static_activation_scale() -> None:
    """A static scale saturates what lies beyond it, in every engine that rounds activations."""
    weight = ScaledTensor(torch.eye(32).to(torch.float8_e4m3fn), torch.ones(1, 1), conformance.TENSOR)
    scheme = Scheme(weight=conformance.TENSOR, activation=conformance.TENSOR, static=True)
    x = torch.tensor([[1.0, -2000.0] + [0.0] * 30])
    scale = torch.tensor([2.0])
    for name in ("reference", "torch"):
        y = ENGINES[name].linear(x, ENGINES[name].prepare(weight, scheme, input_scale=scale), None, torch.float32)
        assert y[0, :2].tolist() == [1.0, -896.0], name


def test_prepared_names_its_engine() -> None:
    weight = ScaledTensor(torch.ones(32, 32).to(torch.float8_e4m3fn), torch.ones(1, 1), conformance.TENSOR)
    scheme = Scheme(weight=conformance.TENSOR, activation=None)
    machine = probe("cpu")
    for name, engine in ENGINES.items():
        if not engine.rejects(MatmulSpec(scheme=scheme, n=32, k=32), machine):
            prepared = engine.prepare(weight, scheme)
            assert prepared.engine == name
            assert (prepared.n, prepared.k) == (32, 32)
