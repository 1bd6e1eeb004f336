"""What benchmarks/accumulation.py found decides from which K on sums are precise, and is the table in the docs.

Needs no emulator: tests/emulated computes the saved errors again.
"""

from __future__ import annotations

import json

import pytest
from scripts import BENCHMARKS, load

from fp8gemm.engines.base import FAST_UP_TO_K

accumulation = load("accumulation")
ROWS = json.loads((BENCHMARKS / "results/accumulation_emulated.json").read_text())["rows"]
SHARE = 1 / 12  # of FP8's own error: added in squares, it makes that 0.35 % larger


def test_fast_sums_end_where_they_begin_to_count() -> None:
    share = {(row["K"], row["card"]): row["share"] for row in ROWS if row["operands"] == "language model"}
    for card in accumulation.CARDS:
        assert share[FAST_UP_TO_K, card] < SHARE < share[2 * FAST_UP_TO_K, card]


@pytest.mark.parametrize("kind", accumulation.OPERANDS)
def test_only_fast_sums_grow_with_k(kind: str) -> None:
    for card in accumulation.CARDS:
        rows = [row for row in ROWS if (row["operands"], row["card"]) == (kind, card)]
        fast = [row["fast"] for row in rows]
        assert [row["K"] for row in rows] == list(accumulation.LENGTHS)
        assert fast == sorted(fast)
        assert fast[-1] > 10 * fast[0]
        assert all(row["precise"] < row["bfloat16"] / 2 for row in rows)


@pytest.mark.parametrize("kind", accumulation.OPERANDS)
def test_the_docs_have_these_figures(kind: str) -> None:
    assert accumulation.markdown(ROWS, kind) in (BENCHMARKS.parent / "docs/engines.md").read_text()
