"""Tuning the Triton engine: times plans for the shapes of a model on a GPU and writes the fastest to its table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..engines import MatmulSpec, probe
from ..engines.triton import table as tables
from ..engines.triton.engine import TritonEngine
from ..engines.triton.plan import Kind, Plan, bucket
from ..engines.triton.tune import TUNED, WORTH_IT, Cell, candidates, describe, held, open_table, stays
from ..errors import UnsupportedError
from ..models.siblings import SiblingLinear
from ..models.warmup import TOKENS
from ..progress import progress
from ..scaled import SCHEMES
from ..weights import FP8Linear
from .contest import Entrant, Expectation, Result, Watch, Weights, contest, dense_entrant, entrant_of, watch_of
from .place import Setting, device_of, setting_of, shapes_of, sizes_of
from .text import figures

FINALISTS = 3  # the fastest plans, timed again with the formula's: the fastest of many is partly luck

Problem = tuple[Kind, int, int]  # kind, N and K
Source = nn.Module | Checkpoint | Iterable[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class TunedProduct:
    """One row of the table: its plan (None if none ran), compared with the formula's and with bfloat16."""

    kind: Kind
    n: int
    k: int
    m: int
    plan: str | None
    formula: str
    microseconds: float | None
    formula_microseconds: float | None
    bf16_microseconds: float | None
    candidates: int
    dropped: Mapping[str, str]

    def __str__(self) -> str:
        took = (self.microseconds, self.formula_microseconds, self.bf16_microseconds)
        same = " (the formula's)" if self.plan == self.formula else ""
        line = f"{self.kind:<7}{f'{self.n} x {self.k}':>15} {self.m:>6}{figures(*((one, '10.1f') for one in took))}"
        dropped = [f"    dropped: {plan}: {note}" for plan, note in self.dropped.items()]
        return "\n".join([f"{line}  {self.plan or 'none ran'}{same}, of {self.candidates}", *dropped])


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The results of ``tune``, written to ``table``, and what it left out; ``str(tuning)`` is a table."""

    setting: Setting
    table: str
    rows: tuple[TunedProduct, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether some product got no plan."""
        return any(row.plan is None for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """All results in plain Python types."""
        rows = [asdict(row) for row in self.rows]
        return {**asdict(self.setting), "table": self.table, "rows": rows, "left_out": dict(self.left_out)}

    def __str__(self) -> str:
        columns = f"{'kind':<7}{'N x K':>15} {'M':>6}{'us':>10}{'formula':>10}{'bf16':>10}  plan"
        left_out = [f"left out: {problem}: {reason}" for problem, reason in self.left_out.items()]
        return "\n".join([str(self.setting), columns, *map(str, self.rows), *left_out, f"wrote {self.table}"])


@torch.no_grad()
def tune(
    what: Source,
    *,
    tokens: Iterable[int] = TOKENS,
    kinds: Sequence[Kind] | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    seconds: float = 1.0,
) -> Tuning:
    """Times plans of the Triton engine and writes the fastest to the user's table, which takes effect at once.

    Each candidate is first checked against the float32 product; the formula's plan is kept unless another is at least
    3 % faster. Existing rows of the same GPU are kept, and the table is written after every shape. Grouped products of
    experts have no table. CUDA graphs, and layers outside of ``what`` that ran before, keep their plans.

    Args:
        what: a model or checkpoint, whose FP8 Linears are tuned, or shapes (N, K).
        tokens: each M stands for its bucket, which ends at the next power of two.
        kinds: ``"row"``, ``"block"``, ``"weight"`` (weight-only); by default all, or those of the layers.
        overwrite: start with an empty table, whatever it has.
        seconds: the time to spend on each kind, shape and M.

    Raises:
        UnsupportedError: the Triton engine cannot run here, with its reasons; or a CUDA graph is being captured.
        ValueError: there is nothing to tune, or the table belongs to another GPU.
    """
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if torch.compiler.is_compiling() or (started and torch.cuda.is_current_stream_capturing()):
        raise UnsupportedError(
            "plans cannot be tuned while a CUDA graph is captured or a model compiled; tune before that"
        )
    device = device_of(device)
    engine = TritonEngine()
    if reasons := engine.rejects(MatmulSpec(scheme=SCHEMES["weight_only"], n=4096, k=4096), probe(device)):
        raise UnsupportedError(f"the triton engine cannot be tuned on {device}: {'; '.join(reasons)}")
    problems, left_out = problems_of(what, kinds, native=engine.place(device).native)
    found = tune_engine(
        engine,
        device,
        problems,
        sizes_of(tokens),
        watches=lambda: watch_of(device),
        overwrite=overwrite,
        seconds=seconds,
    )
    if isinstance(what, nn.Module):
        for layer in what.modules():
            if isinstance(layer, FP8Linear):
                layer._bound = {}  # drop calls that were bound with the former plans
    return replace(found, left_out=left_out)


def tune_engine(
    engine: TritonEngine,
    device: torch.device,
    problems: Sequence[Problem],
    sizes: Iterable[int],
    *,
    watches: Callable[[], Watch],
    overwrite: bool = False,
    seconds: float = 1.0,
) -> Tuning:
    """The core of ``tune``, without checks: tunes these problems with a new watch for each contest."""
    setting = setting_of(device, engine.place(device).card)
    table = open_table(setting.name, setting.versions, setting.date, overwrite=overwrite)
    ends = sorted({bucket(m) for m in sizes})
    cells = [Cell(kind=kind, n=n, k=k, m=m) for (kind, n, k), m in itertools.product(problems, ends)]
    shown = progress(cells, what="tune", total=len(cells), unit="product")
    tuned = []
    for _, group in itertools.groupby(shown, key=lambda cell: (cell.kind, cell.n, cell.k)):
        tuner: _ShapeTuner | None = None
        rows: dict[tables.Key, Plan] = {}
        for cell in group:
            tuner = tuner or _ShapeTuner(engine, Weights(cell.n, cell.k, cell.scheme, device))
            chosen, row = tuner.decide(cell, watches, seconds)
            tuned.append(row)
            if chosen is not None:
                rows[tables.key_of(engine.place(device), cell.kind, cell.n, cell.k, cell.m)] = chosen
        table.add(rows)
    return Tuning(setting=setting, table=str(table.path), rows=tuple(tuned))


class _ShapeTuner:
    """One weight with its copies for the engine and for bfloat16, on which contests are run."""

    def __init__(self, engine: TritonEngine, weights: Weights) -> None:
        self.engine, self.weights = engine, weights
        self.copies, self.dense = weights.packed(engine), weights.dense()

    def decide(self, cell: Cell, watches: Callable[[], Watch], seconds: float) -> tuple[Plan | None, TunedProduct]:
        """The plan for a cell, None if none ran, and the row that reports it."""
        expectation = Expectation(self.weights.tokens(cell.m), self.weights)
        where, fast = self.engine.place(expectation.x.device), self.copies[0].fast
        plans = candidates(where, cell, fast=fast)
        entrants: dict[Plan | None, Entrant] = {
            plan: entrant_of(held(self.engine, plan), self.copies, expectation) for plan in plans
        }
        entrants[None] = dense_entrant(self.dense, expectation)
        first = contest(entrants, watches(), seconds=seconds / 2)
        ahead = [plan for plan in sorted(first, key=lambda plan: _time(first[plan])) if plan is not None][:FINALISTS]
        finalists = {plan: entrants[plan] for plan in (*ahead, plans[0], None) if first[plan].seconds is not None}
        final = {plan: _time(result) for plan, result in contest(finalists, watches(), seconds=seconds / 2).items()}
        dense = final.pop(None, math.inf)
        timed = {plan: time for plan, time in final.items() if plan is not None and time < math.inf}
        chosen = stays(timed, plans[0])
        row = TunedProduct(
            **asdict(cell),
            plan=None if chosen is None else describe(chosen),
            formula=describe(plans[0]),
            microseconds=_micro(timed.get(chosen)) if chosen else None,
            formula_microseconds=_micro(timed.get(plans[0])),
            bf16_microseconds=_micro(dense),
            candidates=len(plans),
            dropped={describe(plan): result.note for plan, result in first.items() if plan and result.note},
        )
        if chosen is None:
            return None, row
        return replace(chosen, kept_is_faster=dense <= WORTH_IT * timed[chosen]), row


def _time(result: Result) -> float:
    return math.inf if result.seconds is None else result.seconds


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None or seconds == math.inf else seconds * 1e6


def problems_of(what: Source, kinds: Sequence[Kind] | None, *, native: bool) -> tuple[list[Problem], dict[str, str]]:
    """The problems to tune, one for each row of the table, and what is left out, with its reason.

    Raises:
        ValueError: a kind does not exist, or nothing is left.
    """
    if wrong := [kind for kind in kinds or () if kind not in TUNED]:
        raise ValueError(f"kinds must be from {', '.join(TUNED)}, found {', '.join(wrong)}")
    left_out: dict[str, str] = {}
    rows: dict[tuple[Kind, int, int], Problem] = {}
    # The largest first: its plans serve the others of its row.
    for kind, n, k in sorted(_asked(what, kinds, native), key=lambda asked: (-asked[1] * asked[2], asked)):
        row = (kind, tables.size_bucket(n), tables.size_bucket(k))
        reason = _reason(kind, n, k, native)
        if not reason and rows.setdefault(row, (kind, n, k)) != (kind, n, k):
            reason = "shares the plans of {1} x {2}".format(*rows[row])
        if reason:
            left_out[f"{kind} {n} x {k}"] = reason
    if not rows:
        found = "; ".join(f"{problem}: {reason}" for problem, reason in left_out.items())
        raise ValueError(f"nothing to tune: {found or 'no FP8 Linears of these kinds'}; give shapes such as 4096x4096")
    return sorted(rows.values()), left_out


def _asked(what: Source, kinds: Sequence[Kind] | None, native: bool) -> set[Problem]:
    if isinstance(what, nn.Module):
        layers = [(layer.scheme, _stored(layer), shape) for layer, shape in _linears(what)]
    elif isinstance(what, Checkpoint):
        stacked = {name for stack in what.stacks.values() for part in stack.parts for name in part}
        single = [layer for name, layer in what.layers.items() if name not in stacked and len(layer.shape) == 2]
        layers = [(layer.scheme, layer.dtype, (layer.shape[0], layer.shape[1])) for layer in single]
    else:
        shapes = shapes_of(what)
        return {(kind, n, k) for kind in kinds or (TUNED if native else ("weight",)) for n, k in shapes}
    found = {(tables.kind_for(scheme, stored, native=native), *shape) for scheme, stored, shape in layers}
    return {problem for problem in found if kinds is None or problem[0] in kinds}


def _linears(model: nn.Module) -> Iterator[tuple[FP8Linear, tuple[int, int]]]:
    """FP8 Linears and the shapes in which they are multiplied; fused siblings have one together."""
    for layer in model.modules():
        if isinstance(layer, FP8Linear):
            group, _ = layer.__dict__.get("_place", (None, 0)) if isinstance(layer, SiblingLinear) else (None, 0)
            together = [layer] if group is None else group.members
            yield layer, (sum(member.out_features for member in together), layer.in_features)


def _stored(layer: FP8Linear) -> torch.dtype:
    stored = layer.home.stored
    packed = None if stored is None else stored.packed
    return layer.options.weight_dtype if packed is None else packed.data.dtype


def _reason(kind: Kind, n: int, k: int, native: bool) -> str:
    """Why a problem has no row in a table; empty if it has one."""
    if kind not in TUNED:
        return "scales along K have no table, the formula serves it"
    if kind != "weight" and not native:
        return "this GPU has no FP8 products, so its kind is weight"
    if n % 16 or k % 16:
        return "N and K must be multiples of 16, the formula serves others"
    return ""
