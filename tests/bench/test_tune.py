"""Tuning without a GPU: which plans are tried, which one is kept, and what happens to the user's table."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import BLOCKS, fp8, scales, write
from torch import nn

from fp8gemm import (
    MX,
    ROW,
    SCHEMES,
    FP8GemmOptions,
    FP8Linear,
    MatmulSpec,
    Scheme,
    UnsupportedError,
    enable_fp8_gemm,
    fuse_siblings,
    native,
    open_checkpoint,
    probe,
)
from fp8gemm.bench import Tuning, bench, contest, plans, tune
from fp8gemm.bench.contest import Calls, Entrant, errors
from fp8gemm.bench.plans import problems_of, tune_engine
from fp8gemm.engines import PackedWeight
from fp8gemm.engines.reference import ReferenceEngine
from fp8gemm.engines.triton import table as tables
from fp8gemm.engines.triton.engine import TritonEngine
from fp8gemm.engines.triton.plan import Place, Plan, formula, place, precise
from fp8gemm.engines.triton.tune import MOST, TUNED, Cell, candidates, describe, held, shared_bytes, stays

CPU = torch.device("cpu")
H200 = place((9, 0), card="NVIDIA H200")
PLACES = {
    f"sm{major}{minor}": place((major, minor)) for major, minor in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
}
# Aligned; N inside a block; narrow and deep; wide; K so long that accumulation is precise; tiny.
SHAPES = ((4096, 4096), (2112, 7168), (512, 16384), (128256, 4096), (4096, 14336), (16, 16))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 16384)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the user's table; one copy of each weight is enough here."""
    monkeypatch.setattr(native, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(contest, "COLD_BYTES", 1)
    tables.forget()
    yield tmp_path
    tables.forget()


def _cells(where: Place) -> list[tuple[Cell, bool]]:
    kinds = TUNED if where.native else ("weight",)
    return [
        (Cell(kind=kind, n=n, k=k, m=m), k <= 8192)  # type: ignore[arg-type]
        for kind, (n, k), m in itertools.product(kinds, SHAPES, TOKENS)
    ]


@pytest.mark.parametrize("where", list(PLACES.values()), ids=list(PLACES))
def test_candidates_can_run_and_are_few(where: Place) -> None:
    for cell, fast in _cells(where):
        found = candidates(where, cell, fast=fast)
        own = formula(where, cell.kind, cell.n, cell.k, cell.m, scale_cols=cell.scale_cols)
        own = own if fast or own.path != "rows" else precise(where, own)
        assert found[0] == replace(own, kept_is_faster=False), (cell, "the formula's is not the first")
        assert len(found) == len(set(found)) <= MOST, cell
        assert len({describe(one) for one in found}) == len(found)
        for one in found:
            _runs(where, cell, one)
            assert fast or one.path != "rows" or precise(where, one) == one, "the engine would run another plan"


def _runs(where: Place, cell: Cell, one: Plan) -> None:
    """The kernels' requirements, written down independently."""
    said = (cell, describe(one))
    assert (
        one.path
        in {
            "row": ("vectors", "tokens", "rows", "library", "dense"),
            "block": ("tokens", "blocks", "library", "dense"),
            "weight": ("vectors", "tokens", "dense"),
        }[cell.kind]
    ), said
    multiple = 128 if cell.kind == "block" else 16
    assert one.path != "library" or (cell.kind in where.library and cell.n % multiple == cell.k % multiple == 0), said
    assert one.path != "vectors" or cell.m <= 4, said
    assert not one.tma or (where.tma and one.path == "rows"), said
    assert shared_bytes(one) <= where.shared, said
    for side in (one.block_m, one.block_n, one.block_k, one.warps, one.splits):
        assert side & (side - 1) == 0, said
    if one.path in ("tokens", "rows", "blocks"):
        assert min(one.block_m, one.block_n, one.block_k) >= 16, said
        assert one.block_m <= max(cell.m, 64), said
    if one.path == "tokens":
        assert cell.scale_cols % one.block_k == 0, said
    if one.path == "blocks":
        assert one.block_k == 128 >= one.block_n, said
    if one.splits > 1:
        assert one.path in ("vectors", "tokens", "blocks"), said
        assert -(-cell.n // one.block_n) * -(-cell.m // max(one.block_m, 1)) <= 4096, said
        assert one.splits <= -(-cell.k // one.block_k), said


def test_every_path_that_is_legal_is_tried() -> None:
    for kind, m, paths in (
        ("row", 1, {"vectors", "tokens", "rows", "library"}),
        ("row", 64, {"tokens", "rows", "library"}),
        ("row", 512, {"library", "rows", "tokens", "dense"}),
        ("row", 4096, {"library", "rows", "dense"}),
        ("block", 16, {"blocks", "tokens", "library"}),
        ("block", 4096, {"library", "blocks", "dense"}),
        ("weight", 4, {"vectors", "tokens"}),
        ("weight", 4096, {"dense"}),
    ):
        found = candidates(H200, Cell(kind=kind, n=4096, k=4096, m=m))  # type: ignore[arg-type]
        assert {one.path for one in found} == paths, (kind, m)


def test_what_the_table_has_is_tried_again(folder: Path) -> None:
    odd = Plan(path="tokens", block_m=16, block_n=256, block_k=32, splits=1, warps=8, stages=2)
    cell = Cell(kind="row", n=4096, k=4096, m=16)
    assert odd not in candidates(H200, cell)
    header = {"source": "tuned", "card": H200.card, "versions": {}, "date": "2026-11-21"}
    rows = {tables.key_of(H200, cell.kind, cell.n, cell.k, cell.m): odd}
    tables.write_table(folder / tables.USER_FILE, header, rows)
    tables.forget()
    assert candidates(H200, cell)[1] == odd


def test_a_row_serves_only_what_its_plan_can_run(folder: Path) -> None:
    """Other problems of the bucket: not if K or N is no multiple of 16, nor with more tiles than there are counters."""
    rows = {
        "row": Plan(path="rows", block_m=128, block_n=128, block_k=128, stages=3, tma=True),
        "weight": Plan(path="tokens", block_m=64, block_n=64, block_k=128, splits=2),
        "block": Plan(path="blocks", block_m=64, block_n=128, block_k=128, stages=3),
    }
    header = {"source": "tuned", "card": H200.card, "versions": {}, "date": "2026-11-21"}
    table = {tables.key_of(H200, kind, 65536, 4096, 64): own for kind, own in rows.items()}  # type: ignore[arg-type]
    tables.write_table(folder / tables.USER_FILE, header, table)
    for kind, n, k, served in (
        ("row", 65536, 4096, True),
        ("row", 65536, 4095, False),
        ("row", 65535, 4096, False),
        ("block", 65520, 4096, True),
        ("block", 65535, 4096, False),
        ("weight", 65536, 4096, True),
        ("weight", 65536, 4088, False),
    ):
        found = tables.plan(H200, kind, n, k, 64, scale_cols=128 if kind == "block" else 0)  # type: ignore[arg-type]
        assert (found == rows[kind]) == served, (kind, n, k)
    assert not tables.runs(H200, "weight", rows["weight"], 65552, 4096, 64), "more tiles than counters"


def test_three_percent_are_noise() -> None:
    home, other = Plan(path="library"), Plan(path="dense")
    assert stays({home: 1.0, other: 0.98}, home) == home
    assert stays({home: 1.0, other: 0.97}, home) == other
    assert stays({other: 9.0}, home) == other
    assert stays({}, home) is None


def test_held_engines_run_one_plan() -> None:
    engine, one = Fake(), Plan(path="dense")
    weight = engine.prepare(contest.Weights(32, 32, SCHEMES["row"], CPU).scaled, SCHEMES["row"])
    assert held(engine, one).plan(1, weight, torch.bfloat16) == one
    assert held(engine, one).rounds(128, weight).activation is None
    assert engine.plan(1, weight, torch.bfloat16).path == "vectors"
    assert engine.rounds(128, weight).activation == ROW


@dataclass
class Laboratory:
    """The results of fake kernels and their times: seconds by plan, None for bfloat16's product."""

    seconds: Callable[[Plan | None], float] = lambda plan: 1.0
    wrong: Callable[[Plan], bool] = lambda plan: False
    fails: Callable[[Plan], bool] = lambda plan: False
    ran: list[Plan] = field(default_factory=list)


LABORATORY = Laboratory()


@pytest.fixture
def laboratory() -> Laboratory:
    LABORATORY.__init__()  # type: ignore[misc]
    return LABORATORY


class Fake(TritonEngine):
    """Computes products with the reference engine, as if on an H200."""

    def place(self, device: torch.device) -> Place:
        return H200

    def rejects(self, spec, machine) -> list[str]:
        return []

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        plan = self.plan(x.shape[0], weight, x.dtype)
        LABORATORY.ran.append(plan)
        if LABORATORY.fails(plan):
            raise RuntimeError("out of resource: shared memory,\n Required: 300000, Hardware limit: 232448")
        met = replace(weight, scheme=self.rounds(x.shape[0], weight, x.dtype))
        y = ReferenceEngine().linear(x, met, bias, out_dtype)
        if LABORATORY.wrong(plan):
            y[-1, -1] = 0
        return y


def _watch(calls: Calls) -> Callable[[], float]:
    LABORATORY.ran.clear()
    calls[0]()
    plan = LABORATORY.ran[-1] if LABORATORY.ran else None
    return lambda: LABORATORY.seconds(plan)


CELL = Cell(kind="row", n=64, k=256, m=16)


def _tuned(cells: tuple[Cell, ...] = (CELL,), where: type[Fake] = Fake, **more: object) -> Tuning:
    problems = list(dict.fromkeys((cell.kind, cell.n, cell.k) for cell in cells))
    sizes = sorted({cell.m for cell in cells})
    return tune_engine(where(), CPU, problems, sizes, watches=lambda: _watch, seconds=0, **more)  # type: ignore[arg-type]


def _plan(cell: Cell = CELL) -> Plan:
    return tables.plan(H200, cell.kind, cell.n, cell.k, cell.m, scale_cols=cell.scale_cols)


def test_the_fastest_is_written_and_taken_at_once(laboratory: Laboratory, folder: Path) -> None:
    home, *others = candidates(H200, CELL)
    best = next(one for one in others if one.path == "rows")
    laboratory.seconds = lambda plan: 0.5 if plan == best else 2.0 if plan is None else 1.0
    assert _plan().path == home.path
    found = _tuned()
    assert _plan() == best
    header, rows = tables.read_table(folder / tables.USER_FILE)
    assert rows == {("sm90", "row", 64, 256, 16): best}
    assert header["card"] == "NVIDIA H200"
    assert header["date"]
    assert header["source"] == "tuned"
    assert header["versions"]["torch"] == torch.__version__
    assert set(header["versions"]) == {"torch", "cuda", "triton", "fp8gemm"}
    (row,) = found.rows
    assert row.plan == describe(best)
    assert row.formula == describe(home)
    assert (row.microseconds, row.formula_microseconds, row.bf16_microseconds) == (0.5e6, 1e6, 2e6)
    assert row.candidates == len(others) + 1
    assert row.dropped == {}
    json.dumps(found.to_dict())


def test_the_formula_stays_where_others_are_not_much_faster(laboratory: Laboratory) -> None:
    home = candidates(H200, CELL)[0]
    laboratory.seconds = lambda plan: 1.0 if plan in (home, None) else 0.98
    _tuned()
    assert _plan() == home


def test_a_wrong_plan_cannot_win(laboratory: Laboratory) -> None:
    """A single wrong output of 1024 is detected."""
    cheat, runner_up = candidates(H200, CELL)[3:5]
    laboratory.wrong = lambda plan: plan == cheat
    laboratory.seconds = lambda plan: {cheat: 0.1, runner_up: 0.5}.get(plan, 1.0)  # type: ignore[arg-type]
    (row,) = _tuned().rows
    assert _plan() == runner_up
    assert row.dropped[describe(cheat)].startswith("wrong by ")
    assert set(row.dropped) == {describe(cheat)}


def test_a_plan_that_fails_is_dropped_with_the_reason(laboratory: Laboratory) -> None:
    home = candidates(H200, CELL)[0]
    laboratory.fails = lambda plan: plan.stages > 3
    (row,) = _tuned().rows
    note = "RuntimeError: out of resource: shared memory, Required: 300000, Hardware limit: 232448"
    assert row.dropped[describe(home)] == note
    assert row.formula_microseconds is None
    assert _plan() != home
    assert row.plan == describe(_plan())


def test_where_nothing_runs_nothing_is_written(laboratory: Laboratory, folder: Path) -> None:
    laboratory.fails = lambda plan: True
    (row,) = _tuned().rows
    assert row.plan is None
    assert tables.read_table(folder / tables.USER_FILE)[1] == {}


def test_whether_a_kept_weight_is_faster_is_measured(laboratory: Laboratory) -> None:
    for dense, kept in ((0.9, True), (0.99, False), (1.5, False)):
        laboratory.seconds = lambda plan, dense=dense: dense if plan is None else 1.0
        _tuned()
        assert _plan().kept_is_faster == kept, dense


def test_tables_of_one_card_are_merged(laboratory: Laboratory, folder: Path) -> None:
    _tuned()
    other = replace(CELL, n=128, m=64)
    _tuned((other,))
    path = folder / tables.USER_FILE
    header, rows = tables.read_table(path)
    assert {(key[2], key[4]) for key in rows} == {(64, 16), (128, 64)}
    assert header["source"] == "tuned"
    tables.write_table(path, {**header, "versions": {"triton": "3.6"}, "date": "2026-01-02"}, rows)
    _tuned()
    header, rows = tables.read_table(path)
    assert len(rows) == 2
    assert header["source"] == "tuned; older rows with triton 3.6 on 2026-01-02"
    _tuned(overwrite=True)
    assert len(tables.read_table(path)[1]) == 1


class Other(Fake):
    def place(self, device: torch.device) -> Place:
        return replace(H200, card="NVIDIA H100 PCIe")


def test_a_table_of_another_card_is_not_overwritten(laboratory: Laboratory, folder: Path) -> None:
    _tuned()
    path = folder / tables.USER_FILE
    before = path.read_text()
    laboratory.ran.clear()
    with pytest.raises(
        ValueError, match=rf"{path} has plans for NVIDIA H200, .* NVIDIA H100 PCIe: --overwrite"
    ) as told:
        _tuned(where=Other)
    assert "FP8GEMM_CACHE" in str(told.value)
    assert not laboratory.ran, "it was tuned before it was refused"
    assert path.read_text() == before
    _tuned(where=Other, overwrite=True)
    assert tables.read_table(path)[0]["card"] == "NVIDIA H100 PCIe"


def test_a_broken_table_is_not_overwritten_either(laboratory: Laboratory, folder: Path) -> None:
    path = folder / tables.USER_FILE
    path.write_text("not JSON")
    with pytest.raises(ValueError, match=f"{path.name} is not a table of plans"):
        _tuned()
    _tuned(overwrite=True)
    assert len(tables.read_table(path)[1]) == 1


def test_what_is_done_is_written_after_each_shape(laboratory: Laboratory, folder: Path) -> None:
    def interrupted(plan: Plan | None) -> float:
        if (folder / tables.USER_FILE).is_file():
            raise KeyboardInterrupt
        return 1.0

    laboratory.seconds = interrupted
    with pytest.raises(KeyboardInterrupt):
        _tuned((CELL, replace(CELL, n=128)))
    assert [key[2] for key in tables.read_table(folder / tables.USER_FILE)[1]] == [64]


def test_tokens_are_buckets(laboratory: Laboratory, folder: Path) -> None:
    found = tune_engine(Fake(), CPU, [("row", 64, 256)], [5, 6, 8, 9, 99999], watches=lambda: _watch, seconds=0)
    assert [row.m for row in found.rows] == [8, 16, 16384]


def test_shapes_that_are_left_out_say_why() -> None:
    problems, left_out = problems_of([(4096, 4096), (4000, 4096), (4095, 4096), (128, 60)], ["row"], native=True)
    assert problems == [("row", 4096, 4096)]
    assert left_out == {
        "row 4000 x 4096": "shares the plans of 4096 x 4096",
        "row 4095 x 4096": "N and K must be multiples of 16, the formula serves others",
        "row 128 x 60": "N and K must be multiples of 16, the formula serves others",
    }
    assert [kind for kind, *_ in problems_of([(64, 64)], None, native=True)[0]] == ["block", "row", "weight"]
    assert problems_of([(64, 64)], None, native=False)[0] == [("weight", 64, 64)]
    with pytest.raises(ValueError, match=r"nothing to tune: row 64 x 64: this GPU has no FP8 products"):
        problems_of([(64, 64)], ["row"], native=False)
    with pytest.raises(ValueError, match=r"kinds must be from row, block, weight, found rows"):
        problems_of([(64, 64)], ["rows"], native=True)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"shapes are \(N, K\), both at least 1; found none"):
        problems_of([], None, native=True)


def test_shapes_of_a_model() -> None:
    def layer(n: int, k: int, scheme: object = "row", **more: object) -> FP8Linear:
        options = FP8GemmOptions(scheme=scheme, engine="reference", **more)  # type: ignore[arg-type]
        return FP8Linear.from_linear(nn.Linear(k, n), options)

    model = nn.Sequential(
        layer(64, 32),
        layer(64, 32),
        layer(128, 128, "block"),
        layer(32, 64, "weight_only", materialize_fp8_on_wrap=False),
        layer(48, 64, weight_dtype=torch.float8_e5m2),
        layer(64, 64, Scheme(weight=MX, activation=None)),
        nn.Linear(512, 512),
    )
    problems, left_out = problems_of(model, None, native=True)
    assert problems == [("block", 128, 128), ("row", 64, 32), ("weight", 32, 64), ("weight", 48, 64)]
    assert left_out == {"weight_k 64 x 64": "scales along K have no table, the formula serves it"}
    assert problems_of(model, ["block"], native=True)[0] == [("block", 128, 128)]
    assert {kind for kind, *_ in problems_of(model, None, native=False)[0]} == {"weight"}
    with pytest.raises(ValueError, match="nothing to tune: no FP8 Linears"):
        problems_of(nn.Linear(64, 64), None, native=True)


def test_joined_siblings_are_tuned_in_their_joined_shape() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, n) for n in (64, 32, 32))
            self.o_proj = nn.Linear(64, 64)

    model = enable_fp8_gemm(Attention(), options=FP8GemmOptions(engine="reference"))
    fuse_siblings(model)
    assert problems_of(model, None, native=True)[0] == [("row", 64, 64), ("row", 128, 64)]


def test_shapes_of_a_checkpoint(tmp_path: Path) -> None:
    """Each layer is tuned for its own scheme; stacked experts have no table."""
    tensors: dict[str, torch.Tensor] = {}
    names = {"q": (256, 128), "experts.0.gate_proj": (128, 128), "experts.0.up_proj": (128, 128)}
    names |= {"experts.0.down_proj": (128, 128)}
    for name, (n, k) in names.items():
        tensors[f"layers.0.mlp.{name}.weight"] = fp8(n, k)
        tensors[f"layers.0.mlp.{name}.weight_scale_inv"] = scales(n // 128, k // 128)
    checkpoint = open_checkpoint(write(tmp_path / "in", tensors, BLOCKS))
    assert problems_of(checkpoint, None, native=True)[0] == [("block", 256, 128)]


def test_tune_without_a_card_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UnsupportedError, match="the triton engine cannot be tuned on cpu: runs on cuda only, found cpu"
    ):
        tune([(64, 64)])
    with pytest.raises(UnsupportedError, match=r"cuda:1 does not exist: torch finds 0 CUDA devices; use cpu"):
        tune([(64, 64)], device="cuda:1")
    with pytest.raises(UnsupportedError, match="products are timed on cpu and cuda, found mps"):
        tune([(64, 64)], device="mps")


@pytest.mark.parametrize("question", ["cuda.is_current_stream_capturing", "compiler.is_compiling"])
def test_nothing_is_tuned_during_a_capture(question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: question.startswith("cuda"))
    monkeypatch.setattr(f"torch.{question}", lambda: True)
    with pytest.raises(UnsupportedError, match="while a CUDA graph is captured or a model compiled; tune before"):
        tune([(64, 64)])


def test_tune_a_model(laboratory: Laboratory, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of ``tune`` with the reference as kernels: the table, and layers that drop their bound calls."""
    monkeypatch.setattr(plans, "TritonEngine", Fake)
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 60)), options=FP8GemmOptions(engine="cpu"))
    model[0]._bound = {"key": "call"}
    found = tune(model, tokens=[1, 16], device="cpu", seconds=0.01)
    assert model[0]._bound == {}
    assert [(row.kind, row.n, row.k, row.m) for row in found.rows] == [
        ("row", 32, 64, 1),
        ("row", 32, 64, 16),
    ]
    assert list(found.left_out) == ["row 60 x 32"]
    assert found.table == str(folder / tables.USER_FILE)
    assert len(tables.read_table(folder / tables.USER_FILE)[1]) == 2
    with pytest.raises(ValueError, match="tokens must be at least 1, found 0"):
        tune(model, tokens=[0, 1], device="cpu")


def test_a_contest_names_what_is_wrong_and_what_fails() -> None:
    expected = torch.randn(4, 64)

    def broken() -> torch.Tensor:
        raise MemoryError("too  much")

    def other(change: Callable[[torch.Tensor], object]) -> Entrant:
        y = expected.clone()
        change(y)
        return Entrant(calls=[lambda: y], expected=expected, tolerance=4e-3)

    entrants: Mapping[str, Entrant] = {
        "right": other(lambda y: y.mul_(1.001)),
        "one lost": other(lambda y: y[2, 5:6].zero_()),
        "NaN": other(lambda y: y[0, 0:1].fill_(float("nan"))),
        "broken": Entrant(calls=[broken], expected=expected, tolerance=1.0),
    }
    results = contest.contest(entrants, lambda calls: lambda: 0.25, seconds=0)
    assert list(results) == list(entrants)
    assert {name for name, result in results.items() if result.seconds == 0.25} == {"right"}
    assert results["right"].error == pytest.approx(1e-3, rel=1e-3)
    assert results["one lost"].note.startswith("wrong by ")
    assert results["NaN"].note.startswith("wrong by nan")
    assert results["broken"].note == "MemoryError: too much"


def test_errors_see_one_element_of_many() -> None:
    expected = torch.randn(64, 4096)
    lost = expected.clone()
    lost[7, 99] = 0 if expected[7, 99].abs() > 0.5 else 3
    whole, worst = errors(lost, expected)
    assert whole < 8e-3 < 4 * 8e-3 < worst


def test_watches_take_turns_over_all_copies() -> None:
    seen: list[int] = []
    calls = [lambda index=index: seen.append(index) or torch.zeros(1) for index in range(3)]
    watch = contest.watch_processor(calls)
    assert all(watch() >= 0 for _ in range(5))
    assert seen == [0, 1, 2, 0, 1, 2]


def test_a_call_in_a_graph_takes_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: every copy runs once before the capture, then all of them in turn inside of it."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return 30.0  # milliseconds

    graph = SimpleNamespace(replay=lambda: None)
    for name, fake in {
        "device": lambda device: nullcontext(),
        "graph": lambda graph, pool, stream: nullcontext(),
        "CUDAGraph": lambda: graph,
        "synchronize": lambda: None,
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    seen: list[int] = []
    calls = [lambda index=index: seen.append(index) for index in range(3)]
    watch = contest.watch_card(calls, CPU, stream=None, pool=None)  # type: ignore[arg-type]
    assert seen == [0, 1, 2] * 6
    assert watch() == pytest.approx(0.030 / 15)


def test_on_a_card(folder: Path) -> None:
    """Every candidate that runs is correct, the table takes effect, and engines are timed along with bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reasons = TritonEngine().rejects(MatmulSpec(scheme=SCHEMES["row"], n=512, k=1024), probe(device))
    if reasons:
        pytest.skip("; ".join(reasons))
    found = tune([(512, 1024)], tokens=[1, 16, 64, 128, 1024], seconds=0.1)
    where = TritonEngine().place(torch.device("cuda", 0))
    _, rows = tables.read_table(folder / tables.USER_FILE)
    assert len(rows) == len(found.rows) >= 5
    for row in found.rows:
        assert row.plan, row
        assert row.bf16_microseconds, row
        assert not any(note.startswith("wrong") for note in row.dropped.values()), row
        cols = 128 if row.kind == "block" else 0
        chosen = tables.plan(where, row.kind, 512, 1024, row.m, scale_cols=cols)
        assert describe(chosen) == row.plan
    timed = bench([(512, 1024)], tokens=[1, 128], seconds=0.1).rows
    assert {row.name for row in timed if row.microseconds} >= {"bf16", "triton"}
