"""Every candidate of a cell computes the right product, whichever of them is the fastest on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stage import AMPERE, HOPPER, OnCard

from fp8gemm import native
from fp8gemm.bench import contest
from fp8gemm.bench.plans import tune_engine
from fp8gemm.engines.triton import table as tables
from fp8gemm.engines.triton.tune import Cell, candidates

# Without a GPU, torch has its row product, but no block product.
ROWS_ONLY = replace(HOPPER, card="a card", library=frozenset({"row"}))


@pytest.mark.parametrize("m", [2, 32, 128])
@pytest.mark.parametrize(
    ("kind", "where"),
    [("row", ROWS_ONLY), ("block", ROWS_ONLY), ("weight", ROWS_ONLY), ("weight", replace(AMPERE, card="a card"))],
    ids=lambda value: value if isinstance(value, str) else value.arch,
)
def test_candidates_are_right(kind: str, where, m: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(contest, "COLD_BYTES", 1)
    monkeypatch.setattr(native, "cache_directory", lambda: tmp_path)
    engine, cell = OnCard(where), Cell(kind=kind, n=80, k=272, m=m)  # type: ignore[arg-type]
    plans = candidates(where, cell)
    problems = [(cell.kind, cell.n, cell.k)]
    once = lambda: lambda calls: lambda: 1.0  # noqa: E731
    (row,) = tune_engine(engine, torch.device("cpu"), problems, [m], watches=once, seconds=0).rows
    assert row.dropped == {}
    assert row.candidates == len(plans) > 1
    assert any(plan.splits > 1 for plan in plans)
    tables.forget()
