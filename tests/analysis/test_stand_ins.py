"""Stand-ins compute what the model's layers compute, within bounds of memory; their times are compared by round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fp8gemm import FP8GemmOptions
from fp8gemm.analysis.profile import Geometry, Problem
from fp8gemm.analysis.stand_ins import Rehearsal, Round, costs, pair
from fp8gemm.weights.geometry import Layout

OPTIONS = FP8GemmOptions()


def problem(name: str = "weight", m: int = 4) -> Problem:
    geometry = Geometry(
        kind="linear",
        options=OPTIONS,
        parameter=name,
        layout=Layout.of((32, 64)),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return Problem(geometry=geometry, x=(m, 64), x_dtype=torch.float32, tokens=m)


def test_costs_compare_within_each_round() -> None:
    """The machine slows down by half in the second round, and everything with it."""
    one = problem()
    rounds = [Round(forward=8 * slow, dense={one: 2 * slow}, fp8={one: 1 * slow}) for slow in (1.0, 2.0, 1.0)]
    assert (costs(rounds)[one].share, costs(rounds)[one].ratio) == (0.25, 0.5)
    rounds[0] = Round(forward=800, dense={one: 2}, fp8={one: 1000})
    assert (costs(rounds)[one].share, costs(rounds)[one].ratio) == (0.25, 0.5)


def pairs() -> Iterator[Any]:
    stack, image = Layout.of((4, 64, 32)), torch.randn(1, 3, 8, 8)
    window = Layout.of((32, 48), folded=(32, 3, 4, 4))
    patches = ((4, 4), (0, 0), (1, 1), False, (0, 0), 1)
    yield "layer", Layout.of((64, 32)), torch.randn(2, 3, 32), ()
    yield "linear", Layout.of((64, 32)), torch.randn(6, 32), ()
    yield "linear", Layout.of((32, 64), turned=True), torch.randn(6, 32), ()
    yield "batched", stack, torch.randn(4, 6, 32), ()
    yield "batched", Layout.of((4, 32, 64), turned=True), torch.randn(4, 6, 32), ()
    yield "convolution", window, image, patches
    yield "grouped", stack, torch.randn(8, 32).bfloat16(), (2, 2, 5, 8)


@pytest.mark.parametrize(("kind", "layout", "x", "settings"), list(pairs()))
def test_stand_ins_compute_the_same_on_fp8(kind: Any, layout: Layout, x: torch.Tensor, settings: Any) -> None:
    geometry = Geometry(
        kind=kind,
        options=OPTIONS,
        parameter="w" if kind != "layer" else "weight",
        layout=layout,
        dtype=x.dtype,
        device=x.device,
        bias=kind in ("layer", "linear", "convolution"),
    )
    found = pair(geometry)
    with torch.no_grad():
        dense, fp8 = found.dense(x, settings), found.fp8(x, settings)
    assert dense.shape == fp8.shape
    # e4m3 rounds weights and activations by 2**-4 at most
    assert not dense.equal(fp8)
    assert (dense - fp8).norm() < 2**-3 * dense.norm()


def test_the_rehearsal_is_limited() -> None:
    """Problems with one weight share its stand-ins, and each is called at least once."""
    few, many = problem(m=2), problem(m=4)
    size = few.geometry.nbytes
    assert size == 32 * 64 * 4
    found = Rehearsal.of([few, many] * 3, most=4 * size)
    assert not found.complete
    assert {one.tokens: len(calls) for one, calls in found.calls.items()} == {2: 2, 4: 2}
    assert Rehearsal.of([few, many] * 3, most=6 * size).complete
    tight = Rehearsal.of([few, many] * 3, most=0)
    assert {one.tokens: len(calls) for one, calls in tight.calls.items()} == {2: 1, 4: 1}
    assert len({id(one) for calls in tight.calls.values() for one, _ in calls}) == 1
