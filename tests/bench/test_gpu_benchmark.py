"""The parts of benchmarks/gpu.py that need no GPU: arguments, cases, lower bounds, ratios, goals, and its output."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripts import BENCHMARKS, load

from fp8gemm import ROW, dequantize, quantize

Row = dict[str, Any]


gpu, card, harness = load("gpu"), load("card"), load("harness")
gpu_candidates, gpu_cases, gpu_goals, gpu_plot = map(load, ("gpu_candidates", "gpu_cases", "gpu_goals", "gpu_plot"))
LARGE = {"n": 8192, "k": 4096}  # 34 MB in FP8


def rows(
    kind: str, m: int, microseconds: dict[str, float], experts: int = 0, n: int = 8192, k: int = 4096
) -> list[Row]:
    """Measured rows of one product; in eager mode each takes as long as bfloat16."""
    case = gpu_cases.Case(kind=kind, model="any", layer="any", n=n, k=k, m=m, experts=experts)
    timed = {name: {"graph us": us, "host us": 10.0} for name, us in microseconds.items()}
    return [{**vars(case), **case.floors, "name": name, **times} for name, times in timed.items()]


def judged(measured: list[Row]) -> dict[str, Row]:
    """The verdicts on one product, by goal."""
    return {verdict["goal"]: verdict for verdict in gpu_goals.goals(measured)}


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = gpu.parse(["--kinds", "row,block", "--tokens", "1,64", "--skip", "torchao compiled,sgl"])
    assert arguments.kinds == ["row", "block"]
    assert arguments.tokens == [1, 64]
    assert arguments.skip == ["torchao compiled", "sgl"]
    assert arguments.results == BENCHMARKS / "results"
    with pytest.raises(SystemExit):
        gpu.parse(["--models", "llama-8b,gpt-9"])
    assert "found gpt-9" in capsys.readouterr().err


def test_cases() -> None:
    cases = list(gpu_cases.cases(list(gpu_cases.KINDS), list(gpu_cases.MODELS), [1, 64]))
    assert len(cases) == len(set(cases))
    assert {case.kind for case in cases} == set(gpu_cases.KINDS)
    assert all((case.experts > 0) == (case.kind == "grouped") for case in cases)
    assert {(case.n, case.k) for case in cases} >= {(6144, 4096), (2112, 7168), (3072, 15360)}


def test_floors() -> None:
    """The lower bounds of the published table: 7.81 and 3.91 us at M = 1, 174 and 87.0 at M = 4096."""
    for m, bf16, fp8 in ((1, 7.81, 3.91), (4096, 174, 87.0)):
        floors = gpu_cases.Case(kind="row", model="", layer="o", n=4096, k=4096, m=m).floors
        assert floors["bf16 floor us"] == pytest.approx(bf16, rel=2e-3)
        assert floors["fp8 floor us"] == pytest.approx(fp8, rel=2e-3)


def test_ratios() -> None:
    measured = rows("row", 4, {"bf16": 8.0, "fp8gemm auto": 4.0, "x": 3.0, "y": 5.0}, n=10, k=50)
    measured[1]["host us"] = 15.0
    measured.append({**measured[0], "name": "not there"})
    for column in ("graph us", "host us"):
        del measured[-1][column]
    found = gpu.with_ratios(measured)
    assert [row.get("x bf16") for row in found] == [1.0, 2.0, 8 / 3, 1.6, None]
    assert [row.get("x host") for row in found] == [1.0, 1.5, 1.0, 1.0, None]
    assert [row.get("x peer") for row in found] == [None, 0.75, None, None, None]
    assert found[1]["TFLOP/s"] == pytest.approx(2 * 4 * 10 * 50 / 4e-6 / 1e12)
    assert gpu.with_ratios([{"name": "bf16", "note": "failed"}]) == [{"name": "bf16", "note": "failed"}]


def test_peers_that_are_not_there_and_that_are(tmp_path: Path) -> None:
    assert card.load_peers(tmp_path / "none" / "peers.py") == (None, {"peers": "no none folder"})
    path = tmp_path / "peers.py"
    path.write_text("def load(which=('a', 'c')):\n    return dict.fromkeys(which, True), {'b': 'OSError: gone'}\n")
    peers, notes = card.load_peers(path)
    assert peers is not None
    assert notes == {"a": "loaded", "c": "loaded", "b": "OSError: gone"}
    assert card.load_peers(path, "c")[1] == {"c": "loaded", "b": "OSError: gone"}


def reference(x: torch.Tensor, w: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    return ((x.float() * x_scale) @ (w.float() * w_scale).t()).bfloat16()


def broken(*operands: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image")


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    xq = quantize(x, ROW)
    return xq.data, xq.scale.view(-1)


PEERS = SimpleNamespace(
    rowquant=lambda torch: {"fbgemm_rowq": rounded},
    rowwise=lambda torch: {
        "fbgemm_row": reference,
        "fbgemm_gemv_w8a8": reference,
        "vllm_twice": lambda *operands: 2 * reference(*operands),
        "sgl_row": broken,
    },
    blockwise=lambda torch: {"deep_gemm": broken},
    w8a16=lambda torch: {"fbgemm_gemv_w8a16": lambda x, w, scale: (x.float() @ (w.float() * scale).t()).bfloat16()},
    grouped=lambda torch: {"fbgemm_grouped": broken},
)


@pytest.fixture
def cpu_instead_of_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are meaningless here, but everything else is as on a GPU."""
    monkeypatch.setattr(gpu, "captured", lambda call: call)
    monkeypatch.setattr(gpu, "card_seconds", harness.wall_seconds)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def measured(kind: str, m: int, experts: int = 0) -> dict[str, Row]:
    case = gpu_cases.Case(kind=kind, model="any", layer="any", n=256, k=128, m=m, experts=experts)
    operands = gpu_candidates.Operands(case, "cpu")
    operands.copies = 2
    return {row["name"]: row for row in gpu.measure(operands, PEERS, 2, ["torchao"])}


@pytest.mark.usefixtures("cpu_instead_of_card")
def test_every_candidate_of_a_row_product_is_checked_then_timed() -> None:
    found = measured("row", 4)
    assert "torchao eager" not in found
    timed = {name for name, row in found.items() if "graph us" in row}
    right = {"fbgemm_row + fbgemm_rowq", "fbgemm_gemv_w8a8 + fbgemm_rowq", "fbgemm_gemv_w8a16"}
    assert timed >= {"bf16", "fp8gemm auto", *right}
    assert all(found[name]["x bf16"] > 0 and found[name]["x host"] > 0 for name in timed)
    assert found["fp8gemm auto"]["note"].startswith("is ")
    assert found["vllm_twice + fbgemm_rowq"]["note"] == "wrong, and so not timed"
    assert found["vllm_twice + fbgemm_rowq"]["error"] == pytest.approx(1, abs=0.1)
    assert found["sgl_row + fbgemm_rowq"]["note"] == "RuntimeError: no kernel image"
    assert not {"vllm_twice + fbgemm_rowq", "sgl_row + fbgemm_rowq"} & timed


@pytest.mark.usefixtures("cpu_instead_of_card")
def test_a_kernel_for_few_tokens_is_not_given_more() -> None:
    found = measured("row", 8)
    assert found["fbgemm_gemv_w8a8"]["note"] == "takes at most 4 tokens"
    assert "fbgemm_gemv_w8a16" not in found


@pytest.mark.usefixtures("cpu_instead_of_card")
def test_grouped_and_block_products() -> None:
    found = measured("grouped", 16, experts=4)
    name = found["fp8gemm auto"]["note"].removeprefix("is ")
    assert found["fp8gemm auto"]["graph us"] == found[name]["graph us"]
    assert found["fbgemm_grouped + fbgemm_rowq"]["note"] == "RuntimeError: no kernel image"
    block = measured("block", 8)
    assert block["fp8gemm auto"]["error"] < 5e-2
    assert "graph us" not in block["deep_gemm"]


def test_one_scale_is_checked_against_its_own_product() -> None:
    """Rows of very different magnitude lose with a single scale what they keep with a scale each."""
    case = gpu_cases.Case(kind="row", model="any", layer="any", n=64, k=128, m=1)
    operands = gpu_candidates.Operands(case, "cpu")
    operands.dense[1:] *= 1e-6
    candidate = gpu_candidates.candidates(operands, PEERS)["fbgemm_gemv_w8a16"]()
    assert gpu.checked(candidate, torch.full((1, 64), torch.nan))["error"] < 4e-3
    assert not torch.equal(candidate.expected(), operands.x.float() @ dequantize(operands.weight).t())


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-3, 4), (1.0, 1), (1e-6, 256 // 2)])
def test_a_graph_holds_all_copies_and_takes_a_few_milliseconds(
    seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "captured", lambda call: call)
    monkeypatch.setattr(gpu, "card_seconds", lambda call: seconds)
    seen: list[int] = []
    replay, count = gpu.graph_of([lambda: seen.append(0), lambda: seen.append(1)])
    replay()
    assert seen == [0, 1] * rounds
    assert count == 2 * rounds


def test_goals_of_few_tokens() -> None:
    floor = rows("row", 16, {"bf16": 1.0}, **LARGE)[0]["fp8 floor us"]
    met = judged(rows("row", 16, {"bf16": 1.76 * floor / 0.81, "fp8gemm auto": floor / 0.81}, **LARGE))
    assert met["row: 1.75 x bf16 at M <= 16"]["met"] is True
    assert met["row: 1.75 x bf16 at M <= 16"]["found"] == pytest.approx(1.76)
    assert met["row: 80 % of copy bandwidth at M <= 16"]["met"] is True
    assert met["row: 80 % of copy bandwidth at M <= 16"]["found"] == pytest.approx(0.81)
    assert met["row: never below 1.0 x bf16"]["met"] is True
    missed = judged(rows("row", 16, {"bf16": 1.74 * floor / 0.79, "fp8gemm auto": floor / 0.79}, **LARGE))
    assert missed["row: 1.75 x bf16 at M <= 16"]["met"] is False
    assert missed["row: 80 % of copy bandwidth at M <= 16"]["met"] is False
    for no_large_one in (rows("row", 16, {"bf16": 1.0}, n=4096, k=4096), rows("grouped", 16, {"bf16": 1.0}, experts=8)):
        assert not any("M <= 16" in goal for goal in judged(no_large_one))


@pytest.mark.parametrize(("m", "wanted"), [(64, 1.6), (1024, 1.55), (4096, 1.55)])
def test_goals_of_many_tokens(m: int, wanted: float) -> None:
    for found, met in ((wanted + 0.01, True), (wanted - 0.01, False), (0.99, False)):
        verdicts = judged(rows("block", m, {"bf16": found * 10, "fp8gemm auto": 10.0}))
        faster = next(verdict for goal, verdict in verdicts.items() if goal.startswith(f"block: {wanted} x bf16"))
        assert (faster["wanted"], faster["met"]) == (wanted, met)
        assert verdicts["block: never below 1.0 x bf16"]["met"] is (found >= 1)
    narrow = judged(rows("row", 1024, {"bf16": 20.0, "fp8gemm auto": 10.0}, n=3072))
    assert not any("M >= 1024" in goal for goal in narrow)


def test_no_goal_is_above_the_ceiling() -> None:
    """Published measurements of an H200: 1.58 times at N = 2048 and 1.76 at N = 4096."""
    for n, most in ((2048, 1.58), (4096, 1.76)):
        case = gpu_cases.Case(kind="row", model="", layer="", n=n, k=4096, m=4096)
        assert gpu_goals.ceiling(case) == pytest.approx(most, abs=5e-3)
    target = gpu_goals.Target(goal="", wanted=1.7, applies=lambda case: True, bound=gpu_goals.ceiling)
    (cell,) = gpu_goals.cells(rows("row", 4096, {"bf16": 16.0, "fp8gemm auto": 10.0}, n=2048))
    assert target.verdict(cell)["wanted"] == pytest.approx(1.576, abs=1e-3)
    assert target.verdict(cell)["met"] is True


def test_goals_against_peers() -> None:
    times = {"bf16": 20.0, "fp8gemm auto": 10.0, "fp8gemm vllm": 1.0}
    row = judged(rows("row", 256, {**times, "sgl": 9.6, "fbgemm": 30.0}))["row: 0.95 x the best peer"]
    assert (row["found"], row["met"]) == (pytest.approx(0.96), True)
    assert judged(rows("row", 256, {**times, "sgl": 9.4}))["row: 0.95 x the best peer"]["met"] is False
    for us, met in ((9.1, True), (8.9, False)):
        verdicts = judged(rows("block", 256, {**times, "deep_gemm": us, "sgl_block": 1.0}))
        assert verdicts["block: 0.9 x DeepGEMM"]["met"] is met
        assert "block: 0.95 x the best peer" not in verdicts
    for us, met in ((10.0, True), (9.9, False)):
        verdicts = judged(rows("grouped", 256, {**times, "fbgemm": us}, experts=8))
        assert verdicts["grouped: 1.0 x the best peer"]["met"] is met


def test_most_cells_reach_the_best_peer() -> None:
    won, lost, alone = {"fp8gemm auto": 9.0, "sgl": 10.0}, {"fp8gemm auto": 10.0, "sgl": 9.8}, {"fp8gemm auto": 1.0}
    for losses, met in ((1, True), (2, False)):
        times = [*[won] * (10 - losses), *[lost] * losses, alone]
        measured = [row for m, each in enumerate(times, 100) for row in rows("row", m, {"bf16": 20.0, **each})]
        found = [verdict for verdict in gpu_goals.goals(measured) if "90%" in verdict["goal"]]
        assert [(one["found"], one["met"], one["cell"]) for one in found] == [(1 - losses / 10, met, "10 cells")]


def test_goals_that_cannot_be_judged_say_why() -> None:
    alone = judged(rows("block", 64, {"bf16": 16.1, "fp8gemm auto": 10.0}))
    verdict = alone["block: 0.9 x DeepGEMM"]
    assert (verdict["found"], verdict["met"], verdict["why"]) == (None, None, "DeepGEMM was not timed")
    assert alone["block: 1.6 x bf16 at M = 64"]["met"] is True
    no_peer = judged(rows("row", 64, {"bf16": 16.1, "fp8gemm auto": 10.0}))
    assert {verdict["why"] for goal, verdict in no_peer.items() if "peer" in goal} == {"a peer was not timed"}
    assert {verdict["met"] for goal, verdict in no_peer.items() if "peer" in goal} == {None}
    no_bf16 = judged(rows("row", 64, {"fp8gemm auto": 10.0, "sgl": 10.0}))
    assert no_bf16["row: never below 1.0 x bf16"]["why"] == "bf16 was not timed"
    assert no_bf16["row: 0.95 x the best peer"]["met"] is True


def test_what_fails_where_others_run_has_missed_its_goals() -> None:
    verdicts = judged(rows("row", 64, {"bf16": 16.1, "sgl": 10.0}))
    assert {verdict["met"] for verdict in verdicts.values()} == {False}
    assert verdicts["row: 0.95 x the best peer"]["why"] == "fp8gemm auto was not timed"


def test_goal_of_host_time() -> None:
    for host, met in ((15.0, True), (15.1, False)):
        measured = rows("row", 64, {"bf16": 20.0, "fp8gemm auto": 10.0})
        measured[1]["host us"] = host
        assert judged(measured)["row: host time at most 1.5 x bf16's at M <= 64"]["met"] is met
    assert not any("host" in goal for goal in judged(rows("row", 256, {"bf16": 20.0, "fp8gemm auto": 10.0})))


def test_goals_of_models() -> None:
    def row(mode: str, tokens: int, ratio: float | None, name: str = "fp8gemm auto") -> Row:
        measured = {} if ratio is None else {"x bf16": ratio}
        return {"case": "c", "name": name, "mode": mode, "tokens": tokens, "note": "it failed", **measured}

    def verdicts(*measured: Row) -> list[tuple[float, bool | None]]:
        return [(one["wanted"], one["met"]) for one in gpu_goals.model_goals(list(measured))]

    assert verdicts(row("eager", 1024, 1.3), row("eager", 1, 1.0), row("graph", 1024, 1.6)) == [
        (1.3, True),
        (1.0, True),
        (1.6, True),
    ]
    assert verdicts(row("eager", 1024, 1.29), row("eager", 1, 0.99), row("graph", 1024, 1.59)) == [
        (1.3, False),
        (1.0, False),
        (1.6, False),
    ]
    assert verdicts(row("eager", 4096, 1.0), row("graph", 1, 0.5), row("eager", 1024, 9.0, "torchao")) == []
    assert gpu_goals.model_goals([row("graph", 1024, None)])[0]["why"] == "it failed"


def test_summary() -> None:
    measured = [
        *rows("row", 64, {"bf16": 16.1, "fp8gemm auto": 10.0}),
        *rows("row", 64, {"bf16": 15.9, "fp8gemm auto": 10.0}, n=4096),
    ]
    counted, missed = gpu_goals.summary(gpu_goals.goals(measured)).split("missed:")
    lines = {line.split("  ")[0].strip(): line.split() for line in map(str.strip, counted.splitlines())}
    assert lines["row: 1.6 x bf16 at M = 64"][-3:] == ["1", "1", "0"]
    assert "0       0           2  a peer was not timed" in counted
    assert "row 4096 x 4096, M = 64   1.600  1.590" in missed
    assert len(missed.strip().splitlines()) == 2
    assert gpu_goals.summary([]) == "no goal is about these"


def test_what_is_written(tmp_path: Path) -> None:
    measured = gpu.with_ratios(rows("row", 4, {"bf16": 8.0, "fp8gemm auto": 4.0}))
    measured.append({**measured[0], "m": 16, "name": "a", "note": "not there"})
    path = harness.save("try", measured, directory=tmp_path / "new", card="X", goals=gpu_goals.goals(measured))
    written = json.loads(path.read_text())
    assert path == tmp_path / "new" / "try.json"
    assert written["card"] == "X"
    assert written["date"]
    assert written["rows"] == measured
    assert {"goal", "cell", "wanted", "found", "met"} <= set(written["goals"][0])


def test_pictures(tmp_path: Path) -> None:
    measured = [
        row
        for m in (4, 64)
        for row in gpu.with_ratios(rows("row", m, {"bf16": 8.0, "fp8gemm auto": 4.0}, n=4096, k=4096))
    ]
    assert gpu_plot.floor_rates(measured) == {
        row["m"]: pytest.approx(2 * row["m"] * 4096**2 / (row["fp8 floor us"] * 1e-6) / 1e12) for row in measured
    }
    pictures = gpu_plot.plot(measured, "try", tmp_path)
    assert len(pictures) == (importlib.util.find_spec("matplotlib") is not None)
    assert all(picture.stat().st_size > 1000 for picture in pictures)


def test_without_a_card_it_says_so() -> None:
    command = [sys.executable, "gpu.py", "--kinds", "row", "--models", "flux", "--tokens", "1"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "5 cases, but no CUDA card" in done.stderr
