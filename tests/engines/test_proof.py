"""Engines that fail, or compute something else, are found by their proof on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fp8gemm import SCHEMES, Machine, MatmulSpec, ScaledTensor, Scheme, UnsupportedError, quantize
from fp8gemm.engines import ENGINES, PackedWeight, choice, proof
from fp8gemm.engines.reference import ReferenceEngine
from fp8gemm.engines.table import AUTO
from fp8gemm.scaled import MX, ROW, TENSOR

CPU = torch.device("cpu")
BF16 = torch.bfloat16
STATIC = Scheme(weight=ROW, activation=TENSOR, static=True)
ALL = [*SCHEMES.values(), STATIC, Scheme(weight=MX, activation=None, scale_format="ue8m0")]


def spec(scheme: Scheme, **more: Any) -> MatmulSpec:
    return MatmulSpec(scheme=scheme, n=4096, k=4096, **more)


@pytest.mark.parametrize("scheme", ALL, ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_a_right_engine_has_no_problem(scheme: Scheme, dtype: torch.dtype) -> None:
    assert proof.problem(ReferenceEngine(), spec(scheme, compute_dtype=dtype), CPU) == ""
    assert proof.problem(ReferenceEngine(), spec(scheme, compute_dtype=dtype, experts=8), CPU) == ""


class Wrong(ReferenceEngine):
    """A reference whose operands or results are changed."""

    def __init__(self, *, scales: Callable = lambda s: s, x: Callable = lambda x: x, y: Callable = lambda y: y) -> None:
        self.scales, self.x, self.y = scales, x, y

    def prepare(self, weight: ScaledTensor, scheme: Scheme, **more: Any) -> PackedWeight:
        return super().prepare(replace(weight, scale=self.scales(weight.scale)), scheme, **more)

    def linear(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        return self.y(super().linear(self.x(x), *others))


def fails(value: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def last_output_lost(y: torch.Tensor) -> torch.Tensor:
    y[:, -1] = 0
    return y


@pytest.mark.parametrize(
    ("scheme", "engine", "words"),
    [
        ("block", Wrong(scales=lambda s: s.t().contiguous().view(s.shape)), "is exact"),
        ("row", Wrong(scales=lambda s: s.flip(0)), "is exact"),
        ("row", Wrong(x=lambda x: x.nan_to_num(nan=448.0)), "where nan is exact"),
        ("row", Wrong(x=lambda x: torch.where(x.abs() < 1e-8, 0, x)), "its reference for 16 tokens gives 0.0 where "),
        ("row", Wrong(y=last_output_lost), "is exact"),
        ("row", Wrong(y=fails), "fails here: RuntimeError: CUDA error: an illegal memory access"),
        ("row", Wrong(y=lambda y: y[:, :1]), "gives shape (1, 1) instead of (1, 256)"),
    ],
    ids=["block scales in another order", "row scales", "NaN lost", "tiny lost", "a column", "a fault", "a shape"],
)
def test_what_is_wrong_is_found(scheme: Any, engine: Wrong, words: str) -> None:
    assert words in proof.problem(engine, spec(SCHEMES[scheme]), CPU)
    assert words in proof.problem(engine, spec(SCHEMES[scheme]), CPU), "the second answer is the first"


def test_faults_surface_in_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run asynchronously: their faults are raised by the next synchronization, whosever it is."""
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    assert proof.problem(Wrong(), spec(SCHEMES["row"]), CPU) == ""

    class Card:
        type = "cuda"

    monkeypatch.setattr(torch.Tensor, "to", lambda self, what: self if isinstance(what, Card) else _to(self, what))
    assert "illegal memory access" in proof._problem(Wrong(), replace(spec(SCHEMES["row"]), n=64, k=64), Card())  # type: ignore[arg-type]


_to = torch.Tensor.to


def test_auto_goes_on_to_an_engine_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(device="cuda", name="a card", capability=(9, 0))
    weight = quantize(torch.randn(32, 64), ROW)
    monkeypatch.setitem(ENGINES, "wrong", Wrong(y=last_output_lost))
    monkeypatch.setitem(ENGINES, "right", Wrong())
    monkeypatch.setitem(AUTO, "cuda", ("wrong", "right"))
    problem = MatmulSpec(scheme=SCHEMES["row"], n=32, k=64)
    packed = choice.prepare(weight, problem, machine)
    assert ENGINES["right"].linear(torch.ones(1, 64), packed, None, BF16).shape == (1, 32)
    with pytest.raises(
        UnsupportedError, match=r"engine 'wrong' is not used on a card: its reference for 1 tokens gives"
    ):
        choice.prepare(weight, problem, machine, "wrong")
    monkeypatch.setitem(AUTO, "cuda", ("wrong",))
    with pytest.raises(UnsupportedError, match="wrong: engine 'wrong' is not used on a card"):
        choice.prepare(weight, problem, machine)
