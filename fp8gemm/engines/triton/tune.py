"""Tuning the Triton engine: which plans to time on a GPU, which one to keep, and where it is stored."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ... import native
from ...scaled import SCHEMES, Scheme
from . import table as tables
from .engine import TritonEngine
from .plan import TILES, Kind, Place, Plan, formula, precise

MOST = 24  # most candidates of a cell; each takes about a second to compile
# The formula's plan is kept unless another takes at most this fraction of its time: smaller differences are noise.
WORTH_IT = 0.97
# The kinds that have tables, and a scheme of that kind for timing.
TUNED: Mapping[Kind, Scheme] = {
    "row": SCHEMES["row"],
    "block": SCHEMES["block"],
    "weight": SCHEMES["weight_only"],
}
# Steps to neighboring plans, the most promising first: each field is doubled (1) or halved (-1).
_STEPS: tuple[Mapping[str, int], ...] = (
    {"splits": 1},
    {"splits": -1},
    {"block_n": 1},
    {"block_n": -1},
    {"warps": 1},
    {"block_m": -1},
    {"block_m": 1},
    {"warps": -1},
    {"block_m": 1, "block_n": -1},
    {"block_m": -1, "block_n": 1},
    {"block_n": 1, "warps": 1},
    {"block_k": 1},
    {"block_k": -1},
)
_FEW = 6  # the number of these steps for a path that the formula does not choose
_MOST_SPLITS, _MOST_STAGES = 16, 6
# Float32 accumulators per thread: more certainly spill. Half of it where every step adds scaled partial sums.
_SUMS = 128


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of a table: products of a kind with N, K, and M, the upper end of its bucket."""

    kind: Kind
    n: int
    k: int
    m: int

    @property
    def scheme(self) -> Scheme:
        return TUNED[self.kind]

    @property
    def scale_cols(self) -> int:
        return self.scheme.weight.cols or 0


def candidates(where: Place, cell: Cell, *, fast: bool = True) -> list[Plan]:
    """At most ``MOST`` plans that can run a cell, the formula's first.

    Then the tables' current plan for it, and a start on every other path that supports the kind; then the neighbors of
    the first plan that has tiles, and a few of each of the others. ``fast`` is as in ``PackedWeight``: without it, the
    engine itself changes some plans. Plans do not decide whether a kept weight is faster.
    """
    cols = cell.scale_cols
    home = formula(where, cell.kind, cell.n, cell.k, cell.m, scale_cols=cols)
    starts = {start.path: start for start in (*_starts(where, cell), home)}  # the formula's plan, if it has that path
    tiled = sorted((start for start in starts.values() if TILES[start.path]), key=lambda start: start != home)
    near = [list(_neighbours(where, start))[: None if start == tiled[0] else _FEW] for start in tiled]
    current = tables.plan(where, cell.kind, cell.n, cell.k, cell.m, scale_cols=cols)
    ordered = [home, current, *starts.values(), *chain.from_iterable(near)]
    ran = (one if fast else precise(where, one) for one in ordered)
    same = (replace(one, kept_is_faster=False) for one in ran)
    return list(dict.fromkeys(one for one in same if _fits(where, cell, one)))[:MOST]


def _starts(where: Place, cell: Cell) -> Iterator[Plan]:
    """The formula's plans for the cell on other paths, as for GPUs without the library, or for another M or kind."""
    kind, n, k, m = cell.kind, cell.n, cell.k, cell.m
    if kind != "weight":
        own = formula(replace(where, library=frozenset()), kind, n, k, max(m, 65 if kind == "row" else 1))
        yield replace(own, block_m=min(own.block_m, max(m, 64)))
    if m <= 512:
        yield formula(where, "weight_k", n, k, min(m, 64), scale_cols=cell.scale_cols)
    if m <= 4:
        yield formula(where, "weight", n, k, m, wide=True)  # float32 uses vectors for up to 4 tokens
    yield Plan(path="library")
    if m >= 128:
        yield Plan(path="dense")


def _neighbours(where: Place, plan: Plan) -> Iterator[Plan]:
    """Plans one step away, with fewer stages if shared memory requires it."""
    taken = frozenset(TILES[plan.path])
    for step in _STEPS:
        if taken.issuperset(step):
            sizes = {name: getattr(plan, name) * 2 if up > 0 else getattr(plan, name) // 2 for name, up in step.items()}
            yield _fitted(where, replace(plan, **sizes))
    if "stages" in taken:
        yield replace(plan, stages=plan.stages - 1)
        yield replace(plan, stages=plan.stages + 1)
    if "tma" in taken:
        yield replace(plan, tma=not plan.tma)


def _fitted(where: Place, plan: Plan) -> Plan:
    while plan.stages > 1 and shared_bytes(plan) > where.shared:
        plan = replace(plan, stages=plan.stages - 1)
    return plan


def shared_bytes(plan: Plan) -> int:
    """The approximate shared memory of a plan's pipeline: tiles of x and w per stage, x in bfloat16 for ``tokens``."""
    if "stages" not in TILES[plan.path]:
        return 0
    x_bytes = 2 if plan.path == "tokens" else 1
    return plan.stages * (plan.block_m * x_bytes + plan.block_n) * plan.block_k


def _fits(where: Place, cell: Cell, plan: Plan) -> bool:
    """Whether a plan can run a cell and is not wasteful: no idle splits, no rows without tokens, no certain spills."""
    if not tables.runs(where, cell.kind, plan, cell.n, cell.k, cell.m, scale_cols=cell.scale_cols):
        return False
    if not TILES[plan.path]:
        return True
    tiles = -(-cell.n // max(plan.block_n, 1)) * -(-cell.m // max(plan.block_m, 1))
    most = _MOST_SPLITS if tiles <= 4 * where.multiprocessors else 1
    splits_fit = 1 <= plan.splits <= min(most, -(-cell.k // max(plan.block_k, 1)))
    if plan.path == "vectors":
        sums = cell.m * plan.block_n * plan.block_k / (32 * max(plan.warps, 1))
        tile_fits = sums <= _SUMS and plan.block_n >= 1 and plan.block_k >= 128
        return splits_fit and tile_fits and 1 <= plan.warps <= 8 and 1 <= plan.stages <= _MOST_STAGES
    smallest = 16 if plan.path == "tokens" else 64  # rows of a matrix instruction
    return (
        splits_fit
        and 16 <= plan.block_m <= max(cell.m, smallest)
        and 16 <= plan.block_n <= 256
        and 32 <= plan.block_k <= 256
        and plan.block_m * plan.block_n <= (_SUMS // 2 if plan.path == "blocks" else _SUMS) * 32 * plan.warps
        and 2 <= plan.warps <= 8
        and 1 <= plan.stages <= _MOST_STAGES
        and shared_bytes(plan) <= where.shared
    )


def held(engine: TritonEngine, plan: Plan) -> TritonEngine:
    """The same engine with one plan for every product."""
    twin = copy.copy(engine)
    vars(twin)["plan"] = lambda m, weight, dtype: plan
    return twin


def stays(seconds: Mapping[Plan, float], home: Plan) -> Plan | None:
    """The fastest plan; ``home`` (the formula's) unless another is clearly faster; None if none was timed."""
    if not seconds:
        return None
    fastest = min(seconds, key=lambda plan: seconds[plan])
    return home if home in seconds and seconds[fastest] > WORTH_IT * seconds[home] else fastest


def describe(plan: Plan) -> str:
    """A plan in a few words: ``rows 128x256x128, 8 warps, 4 stages, TMA``."""
    taken = TILES[plan.path]
    if not taken:
        return plan.path
    tile = [plan.block_m] * ("block_m" in taken) + [plan.block_n, plan.block_k]
    words = [f"{plan.path} {'x'.join(map(str, tile))}", f"{plan.warps} warps"]
    words += [f"{plan.splits} splits"] if plan.splits > 1 else []
    words += [f"{plan.stages} stages"] if "stages" in taken else []
    return ", ".join([*words, *(["TMA"] if plan.tma else [])])


@dataclass(frozen=True)
class Table:
    """The user's table for one GPU: existing rows and new ones."""

    path: Path
    header: dict[str, Any]
    rows: dict[tables.Key, Plan]

    def add(self, rows: Mapping[tables.Key, Plan]) -> None:
        """Writes the table with these rows added; the engine uses it at once."""
        self.rows.update(rows)
        tables.write_table(self.path, self.header, self.rows)
        tables.forget()


def open_table(card: str, versions: Mapping[str, str | None], date: str, *, overwrite: bool) -> Table:
    """Opens the user's table; ``overwrite`` starts an empty one.

    Raises:
        ValueError: it has plans for another GPU, or is not a table; the message says what would work.
    """
    path = native.cache_directory() / tables.USER_FILE
    header = {"source": "tuned", "card": card, "versions": dict(versions), "date": date}
    if overwrite or not path.is_file():
        table = Table(path, header, {})
        if overwrite:
            table.add({})  # at once, as the engine cannot plan with a broken table
        return table
    former, rows = tables.read_table(path)
    if former["card"] != card:
        raise ValueError(
            f"{path} has plans for {former['card']}, but this GPU is {card}: --overwrite (overwrite=True) replaces "
            "them, FP8GEMM_CACHE=FOLDER keeps them apart"
        )
    if rows and former["versions"] != header["versions"]:
        measured_with = ", ".join(f"{name} {version}" for name, version in (former["versions"] or {}).items())
        header["source"] = f"tuned; older rows with {measured_with} on {former['date']}"
    return Table(path, header, rows)
