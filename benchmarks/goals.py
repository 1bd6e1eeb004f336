"""The project's goals for CPUs, and which rows of benchmarks/linear.py meet them; the engine ``cpu`` is judged.

    python benchmarks/goals.py benchmarks/results/NAME.json

A figure is the median over all shapes and M of a cell, of the speed relative to the dense product of the model's own
dtype. Of products that were measured several times, the last counts. Exits with 1 if a goal is missed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import load_runs, table

OURS = "cpu"
NARROW = 384  # K of MiniLM's layers, which have a goal of their own where bfloat16 is fast
BLOCKS = 0.95  # speed with 128x128 scales, relative to row scales
MOST = 2**31
FEW, SOME, MANY = (2, 8), (16, 64), (128, MOST)  # ranges of M
Row = dict[str, Any]
Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The speeds wanted with row scales, by range of M, for a dtype on processors of some instruction sets."""

    about: str
    dtype: str
    wanted: dict[Range, float]
    isa: tuple[str, ...] = ()  # any if empty
    narrow: bool | None = None  # only K = 384, or only others

    def applies(self, row: Row) -> bool:
        narrow = self.narrow is None or self.narrow == (row["k"] == NARROW)
        return row["dtype"] == self.dtype and narrow and (not self.isa or row["isa"] in self.isa)


# 32 tokens have the goal of 64, and are judged apart from them.
GOALS = (
    Goal(
        about="bfloat16 with AVX512-BF16",
        dtype="bfloat16",
        isa=("avx512_bf16",),
        narrow=False,
        wanted={(1, 1): 3, FEW: 2, (16, 16): 1.4, (32, 32): 1.1, (64, 64): 1.1, MANY: 0.98},
    ),
    Goal(
        about="bfloat16 with AVX512-BF16, K = 384",
        dtype="bfloat16",
        isa=("avx512_bf16",),
        narrow=True,
        wanted={(1, 1): 4, FEW: 3, (16, 16): 2, (32, 32): 1.4, (64, 64): 1.4, MANY: 1},
    ),
    Goal(
        about="bfloat16 without bfloat16 instructions",
        dtype="bfloat16",
        isa=("avx512", "avx2"),
        wanted={(1, 1): 1.3, FEW: 1.5, SOME: 2, MANY: 1.5},
    ),
    Goal(about="float32", dtype="float32", wanted={(1, 1): 2, FEW: 2, SOME: 1.4, MANY: 1.05}),
    Goal(
        about="bfloat16 with AMX",
        dtype="bfloat16",
        isa=("amx",),
        wanted={(1, 1): 2.1, FEW: 1.8, SOME: 1.7, MANY: 1},
    ),
)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    found = verdicts(load_runs(Path(sys.argv[1])))
    if not found:
        raise SystemExit("no goal is about these rows")
    print(table(found, list(found[0])))
    missed = sum(not verdict["met"] for verdict in found)
    print(f"{len(found) - missed} met, {missed} missed")
    raise SystemExit(1 if missed else 0)


def verdicts(runs: Iterable[Row]) -> list[Row]:
    """Every goal for every processor, instruction set, number of threads and range of M that was measured."""
    found = []
    rows = judged(runs)
    for group in _grouped(rows, "processor", "isa", "threads"):
        by_row = [row for row in group if row["scheme"] == "row"]
        for goal in GOALS:
            speeds = [(row["m"], row["x dense"]) for row in by_row if goal.applies(row)]
            found += list(_judge(group[0], goal.about, speeds, goal.wanted))
        for alike in _grouped(group, "dtype"):
            about = f"{alike[0]['dtype']}, 128x128 relative to row scales"
            found += list(_judge(group[0], about, _blocks(alike), dict.fromkeys([(1, 1), FEW, SOME, MANY], BLOCKS)))
    return found


def judged(runs: Iterable[Row]) -> list[Row]:
    """The last row of each product of our engine, with its run's processor and instruction set."""
    last: dict[tuple[Any, ...], Row] = {}
    for run in runs:
        for row in run["rows"]:
            if row["name"] == OURS and "x dense" in row:
                whole = {**row, "processor": run["processor"], "isa": run["isa"]}
                keys = ("processor", "isa", "threads", "dtype", "scheme", "n", "k", "m")
                last[tuple(whole[key] for key in keys)] = whole
    return list(last.values())


def _blocks(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """M, and the speed of 128x128 scales relative to row scales, both relative to the dense product of their run."""
    speeds = {(row["scheme"], row["n"], row["k"], row["m"]): row["x dense"] for row in rows}
    pairs = [(m, x, speeds.get(("row", n, k, m))) for (scheme, n, k, m), x in speeds.items() if scheme == "block"]
    return [(m, x / of_rows) for m, x, of_rows in pairs if of_rows is not None]


def _judge(where: Row, about: str, speeds: Sequence[tuple[int, float]], wanted: dict[Range, float]) -> Iterator[Row]:
    for (first, last), least in wanted.items():
        cell = [speed for m, speed in speeds if first <= m <= last]
        if cell:
            found = statistics.median(cell)
            tokens = str(first) if first == last else f">= {first}" if last == MOST else f"{first} to {last}"
            yield {
                "processor": where["processor"],
                "isa": where["isa"],
                "threads": where["threads"],
                "goal": about,
                "M": tokens,
                "wanted": float(least),
                "found": found,
                "worst": min(cell),
                "cells": len(cell),
                "met": found >= least,
            }


def _grouped(rows: Iterable[Row], *keys: str) -> list[list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())


if __name__ == "__main__":
    main()
