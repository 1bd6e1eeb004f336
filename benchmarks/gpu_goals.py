"""The project's goals for an H200, and which measured rows meet them; ``fp8gemm auto`` is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gpu_cases import BYTES_PER_SECOND, Case
from harness import table

AUTO = "fp8gemm auto"
LARGE = 25e6  # bytes of an FP8 weight from which memory bandwidth alone should decide
MOST = 0.9  # the share of cells in which the best peer has to be matched

# goal, cell, wanted, found, met; if there is nothing to compare with, found and met are None
Verdict = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One product, and its measured times by name, in microseconds."""

    case: Case
    graph: dict[str, float]
    host: dict[str, float]

    def __str__(self) -> str:
        experts = f"{self.case.experts} x " if self.case.experts else ""
        return f"{self.case.kind} {experts}{self.case.n} x {self.case.k}, M = {self.case.m}"

    @property
    def best_peer(self) -> str:
        """The fastest that is neither bfloat16 nor fp8gemm's; empty if none was timed."""
        peers = [name for name in self.graph if name != "bf16" and not name.startswith("fp8gemm ")]
        return min(peers, key=self.graph.__getitem__, default="")


def bf16(cell: Cell) -> str:
    return "bf16"


def best_peer(cell: Cell) -> str:
    return cell.best_peer


def deep_gemm(cell: Cell) -> str:
    return next((name for name in cell.graph if name.startswith("deep_gemm")), "")


def times_faster(cell: Cell, rival: str) -> float:
    return cell.graph[rival] / cell.graph[AUTO]


def bandwidth(cell: Cell, rival: str) -> float:
    """The achieved share of the GPU's copy bandwidth, for the minimum number of bytes."""
    return cell.case.fp8_bytes / (cell.graph[AUTO] * 1e-6) / BYTES_PER_SECOND


def host_ratio(cell: Cell, rival: str) -> float:
    return cell.host[AUTO] / cell.host[rival]


def ceiling(case: Case) -> float:
    """The largest speedup of FP8 over bfloat16 with a separate quantization pass, if bound by arithmetic, on an
    H200."""
    return 2 / (1 + 551 / case.n)


def single(case: Case) -> bool:
    return not case.experts


def few(case: Case) -> bool:
    return single(case) and case.m <= 16 and case.n * case.k >= LARGE


@dataclass(frozen=True, kw_only=True)
class Target:
    """A goal for all cells to which it ``applies``; a cell without the ``rival`` that it needs is not judged."""

    goal: str
    wanted: float
    applies: Callable[[Case], bool]
    rival: Callable[[Cell], str] = bf16
    needs: str = "bf16"
    found: Callable[[Cell, str], float] = times_faster
    at_most: bool = False
    bound: Callable[[Case], float] | None = None

    def verdict(self, cell: Cell) -> Verdict:
        wanted = self.wanted if self.bound is None else min(self.wanted, self.bound(cell.case))
        verdict = {"goal": f"{cell.case.kind}: {self.goal}", "cell": str(cell), "wanted": wanted, "found": None}
        rival = self.rival(cell)
        if rival not in cell.graph:
            return {**verdict, "met": None, "why": f"{self.needs} was not timed"}
        if AUTO not in cell.graph:
            return {**verdict, "met": False, "why": f"{AUTO} was not timed"}
        found = self.found(cell, rival)
        return {**verdict, "found": found, "met": found <= wanted if self.at_most else found >= wanted}


BEST = Target(
    goal="1.0 x the best peer",
    wanted=1.0,
    applies=lambda case: case.kind == "grouped",
    rival=best_peer,
    needs="a peer",
)
TARGETS = (
    Target(goal="1.75 x bf16 at M <= 16", wanted=1.75, applies=few),
    Target(goal="80 % of copy bandwidth at M <= 16", wanted=0.8, applies=few, found=bandwidth),
    Target(goal="1.6 x bf16 at M = 64", wanted=1.6, applies=lambda case: single(case) and case.m == 64),
    Target(
        goal="1.55 x bf16 at M >= 1024",
        wanted=1.55,
        applies=lambda case: single(case) and case.m >= 1024 and case.n >= 4096,
        bound=ceiling,
    ),
    Target(goal="never below 1.0 x bf16", wanted=1.0, applies=lambda case: True),
    Target(
        goal="0.95 x the best peer",
        wanted=0.95,
        applies=lambda case: case.kind == "row",
        rival=best_peer,
        needs="a peer",
    ),
    Target(
        goal="0.9 x DeepGEMM",
        wanted=0.9,
        applies=lambda case: case.kind == "block",
        rival=deep_gemm,
        needs="DeepGEMM",
    ),
    BEST,
    Target(
        goal="host time at most 1.5 x bf16's at M <= 64",
        wanted=1.5,
        applies=lambda case: case.m <= 64,
        found=host_ratio,
        at_most=True,
    ),
)


def goals(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Every goal for every product that it concerns, from the rows of benchmarks/gpu.py."""
    measured = list(cells(rows))
    found = [target.verdict(cell) for cell in measured for target in TARGETS if target.applies(cell.case)]
    return found + most([BEST.verdict(cell) for cell in measured if cell.case.kind == "row"])


def most(verdicts: list[Verdict]) -> list[Verdict]:
    """A goal of its own: that most of the cells that could be judged are met."""
    if not verdicts:
        return []
    reached = [verdict["met"] for verdict in verdicts if verdict["met"] is not None]
    goal = {"goal": f"{verdicts[0]['goal']} in {MOST:.0%} of cells", "cell": f"{len(reached)} cells", "wanted": MOST}
    if not reached:
        return [{**goal, "found": None, "met": None, "why": verdicts[0]["why"]}]
    share = sum(reached) / len(reached)
    return [{**goal, "found": share, "met": share >= MOST}]


def cells(rows: list[dict[str, Any]]) -> Iterator[Cell]:
    """The rows grouped by product."""
    grouped: dict[Case, Cell] = {}
    for row in rows:
        case = Case(**{name: row[name] for name in Case.__dataclass_fields__})
        cell = grouped.setdefault(case, Cell(case, {}, {}))
        if "graph us" in row:
            cell.graph[row["name"]] = row["graph us"]
            cell.host[row["name"]] = row["host us"]
    yield from grouped.values()


# For whole models, relative to bfloat16 in the same mode: (mode, whether one token is decoded, speedup).
MODEL_GOALS = (("eager", False, 1.3), ("eager", True, 1.0), ("graph", False, 1.6))
MODEL_TOKENS = 1024


def model_goals(rows: list[dict[str, Any]]) -> list[Verdict]:
    """The same for the rows of benchmarks/gpu_models.py."""
    found = []
    for mode, decodes, wanted in MODEL_GOALS:
        about = "batch-1 decode" if decodes else f"{MODEL_TOKENS} tokens"
        for row in rows:
            if row["name"] != AUTO or row["mode"] != mode or row["tokens"] != (1 if decodes else MODEL_TOKENS):
                continue
            ratio = row.get("x bf16")
            verdict = {"goal": f"{mode}: {wanted} x bf16, {about}", "cell": row["case"], "wanted": wanted}
            met = None if ratio is None else ratio >= wanted
            why = {} if met is not None else {"why": row.get("note") or "bf16 was not timed"}
            found.append({**verdict, "found": ratio, "met": met, **why})
    return found


def summary(verdicts: list[Verdict]) -> str:
    """How often each goal was met, and the list of misses."""
    if not verdicts:
        return "no goal is about these"
    counts = []
    for goal in dict.fromkeys(verdict["goal"] for verdict in verdicts):
        met = [verdict["met"] for verdict in verdicts if verdict["goal"] == goal]
        why = sorted({verdict["why"] for verdict in verdicts if verdict["goal"] == goal and "why" in verdict})
        counts.append(
            {
                "goal": goal,
                "met": met.count(True),
                "missed": met.count(False),
                "not judged": met.count(None),
                "because": "; ".join(why),
            }
        )
    missed = [verdict for verdict in verdicts if verdict["met"] is False]
    parts = [table(counts, ["goal", "met", "missed", "not judged", "because"])]
    if missed:
        parts += ["missed:", table(missed, ["goal", "cell", "wanted", "found"])]
    return "\n".join(parts)
