"""benchmarks/first_contact.py without a card: its runner with steps that fail in every way, its steps on CPU engines,
its page from a made-up record, and the whole command, which says that there is no GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import BENCHMARKS, load

from fp8gemm import ENGINES, SCHEMES, ScaledTensor, dequantize
from fp8gemm.bench import contest
from fp8gemm.engines import PackedWeight
from fp8gemm.engines.reference import ReferenceEngine
from fp8gemm.engines.triton.engine import TritonEngine
from fp8gemm.engines.triton.plan import place
from fp8gemm.engines.triton.tune import Cell

first_contact, runner, journal = load("first_contact"), load("contact_runner"), load("contact_journal")
steps, probes, pytests, page = (
    load("contact_steps"),
    load("contact_probes"),
    load("contact_tests"),
    load("contact_page"),
)

Row = dict[str, Any]
FAKE = f"""
import os, signal, subprocess, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
from contact_journal import Journal, Refused, Wrong
from contact_worker import run

path, names = Path(sys.argv[1]), sys.argv[2].split(",")
broken = []

def raises(): raise RuntimeError("CUDA error: out of luck")
def wrong(): raise Wrong("2 of 3", {{"tests": 3}})
def refused(): raise Refused("not for this card")
def hangs():
    Path(__file__).with_name("pid").write_text(str(os.getpid()))
    time.sleep(60)
def killed(): os.kill(os.getpid(), signal.SIGKILL)
def segfault(): os.kill(os.getpid(), signal.SIGSEGV)
def leaves(): os._exit(0)
def breaks(): broken.append("an illegal memory access was encountered")
def family():
    child = subprocess.Popen(["sleep", "60"])
    Path(path.parent, "child").write_text(str(child.pid))
    time.sleep(60)
def garbage():
    print("\\x00{{]", flush=True)
    path.open("ab").write(b'\\xff{{"row": "hal')
    return {{"found": "all the same"}}
def fine(): return {{"broken before": bool(broken)}}

if names == ["nothing"]: raise ImportError("no such library")
if names == ["waits"]: time.sleep(60)
rows = {{name: globals()[name.split("-")[0]] for name in names}}
raise SystemExit(run(rows, Journal(path), lambda: "".join(broken)))
"""


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., Row]:
    """Runs a step with rows of these kinds; returns its entry."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def run(*names: str, seconds: float = 60, row_seconds: float = 20, changed: Callable[[Row], object] = id) -> Row:
        step = runner.Step(name="fake", what="", share=1, row_seconds=row_seconds)
        command = [sys.executable, str(script)]
        fake = runner.Run(step=step, folder=tmp_path, command=lambda path, left: [*command, str(path), ",".join(names)])
        return fake(seconds, changed)

    return run


def statuses(entry: Row) -> dict[str, str]:
    return {row["row"]: row["status"] for row in entry["rows"]}


def test_whatever_becomes_of_a_row_the_others_run(fake: Callable[..., Row]) -> None:
    names = ("fine", "raises", "wrong", "refused", "killed", "segfault", "garbage", "leaves", "fine-last")
    entry = fake(*names)
    assert statuses(entry) == {
        **dict.fromkeys(("fine", "garbage", "fine-last"), "ok"),
        **dict.fromkeys(("raises", "wrong"), "failed"),
        "refused": "refused",
        **dict.fromkeys(("killed", "segfault", "leaves"), "died"),
    }
    rows = {row["row"]: row for row in entry["rows"]}
    assert rows["raises"]["note"] == "RuntimeError: CUDA error: out of luck"
    assert rows["wrong"]["found"] == {"tests": 3}
    assert rows["killed"]["note"] == "killed by SIGKILL"
    assert rows["segfault"]["note"] == "killed by SIGSEGV"
    assert rows["garbage"]["found"] == {"found": "all the same"}
    assert entry["status"] == "failed"
    assert "out of luck" in entry["output"]


def test_a_row_that_hangs_is_ended_and_every_row_reported_at_once(fake: Callable[..., Row]) -> None:
    seen: list[Row] = []
    entry = fake("fine", "hangs", "fine-last", row_seconds=5, changed=lambda entry: seen.append(statuses(entry)))
    assert {"fine": "ok", "hangs": "running", "fine-last": "not reached"} in seen
    assert statuses(entry) == {"fine": "ok", "hangs": "timed out", "fine-last": "ok"}
    assert entry["status"] == "timed out"


def test_a_step_ends_in_time_with_all_that_it_started(fake: Callable[..., Row], tmp_path: Path) -> None:
    began = time.monotonic()
    entry = fake("fine", "family", "fine-last", seconds=5)
    assert time.monotonic() - began < 30
    assert statuses(entry) == {"fine": "ok", "family": "timed out", "fine-last": "not reached"}
    assert entry["status"] == "timed out"
    child = int((tmp_path / "child").read_text())
    for _ in range(100):  # until init has collected it
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        if "Z (zombie)" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("a process of the step outlived it")


def test_what_breaks_the_card_costs_its_own_row(fake: Callable[..., Row]) -> None:
    entry = fake("fine", "breaks", "fine-last")
    assert statuses(entry) == {"fine": "ok", "breaks": "failed", "fine-last": "ok"}
    rows = {row["row"]: row for row in entry["rows"]}
    assert rows["breaks"]["note"] == "an illegal memory access was encountered"
    assert rows["fine-last"]["found"] == {"broken before": False}


def test_a_step_that_never_gets_to_a_row(fake: Callable[..., Row], tmp_path: Path) -> None:
    entry = fake("nothing")
    assert (entry["status"], entry["note"], entry["rows"]) == ("failed", "exit status 1", [])
    assert "ImportError: no such library" in entry["output"]
    entry = fake("waits", row_seconds=1)
    assert (entry["status"], entry["note"], entry["rows"]) == ("timed out", "no end in 1 s", [])


def test_reports_of_the_sanitizer_belong_to_rows(fake: Callable[..., Row], tmp_path: Path) -> None:
    report = """== row fine
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at tokens_kernel+0x160 in w8a16.py:88
=========     by thread (3,0,0) in block (0,0,0)
not of it
== row fine-last
========= ERROR SUMMARY: 1 error
"""
    assert runner.sanitizer_reports(report) == {
        "fine": [
            "Invalid __global__ read of size 2 bytes",
            "at tokens_kernel+0x160 in w8a16.py:88",
            "by thread (3,0,0) in block (0,0,0)",
        ]
    }
    (tmp_path / "fake.txt").write_text(report)
    entry = fake("fine", "fine-last")
    assert statuses(entry) == {"fine": "failed", "fine-last": "ok"}
    assert entry["status"] == "failed"


def test_the_sanitizer_is_found_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = next(step for step in first_contact.STEPS if step.name == "sanitized")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(first_contact, "CUDA", str(tmp_path / "none"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert "--without" in first_contact.command_of(step)(Path("journal"), 9.4)
    tool = tmp_path / "home" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    command = first_contact.command_of(step)(Path("journal"), 9.4)
    assert command[0] == str(tool)
    assert command[command.index(sys.executable) + 2 :] == [*("sanitized", "--journal", "journal", "--seconds", "9")]
    products = next(step for step in first_contact.STEPS if step.name == "products")
    assert first_contact.command_of(products)(Path("journal"), 9.4)[0] == sys.executable


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    done = [sys.executable, str(BENCHMARKS / "first_contact.py"), *arguments]
    return subprocess.run(done, env=environment, capture_output=True, text=True, check=False)


def test_without_a_card_every_step_says_so(tmp_path: Path) -> None:
    done = command("--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "first_contact.json").read_text())
    assert list(record["steps"]) == [step.name for step in first_contact.STEPS] == list(steps.STEPS)
    assert {entry["status"] for entry in record["steps"].values()} == {"no GPU"}
    text = (tmp_path / "first_contact.txt").read_text()
    assert "no GPU: 11 of 11 steps had nothing to run on" in text
    assert text in done.stdout


def test_what_a_card_said_stays_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
from contact_journal import Journal
Journal(Path(sys.argv[1])).add({{"none": "no GPU", "note": ""}})
"""
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(
        first_contact, "command_of", lambda step: lambda path, left: [sys.executable, "-c", none, str(path)]
    )
    measured = {"date": "2026-12-01", "steps": {"tune": entry("tune", []), "table": entry("table", [])}}
    path = tmp_path / "card.json"
    path.write_text(json.dumps(measured))
    assert first_contact.main(["--results", str(tmp_path), "--save", "card"]) == 0
    assert json.loads(path.read_text()) == measured
    assert first_contact.main(["--results", str(tmp_path), "--save", "card", "--only", "tune,grouped"]) == 0
    found = json.loads(path.read_text())["steps"]
    assert {name: found[name]["status"] for name in found} == {"tune": "ok", "table": "ok", "grouped": "no GPU"}


def test_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert first_contact.parse([]).minutes == 25
    assert first_contact.parse(["--only", "table,tune"]).only == ["table", "tune"]
    with pytest.raises(SystemExit):
        first_contact.parse(["--only", "table,coffee"])
    assert "found coffee" in capsys.readouterr().err
    (tmp_path / "first_contact.json").write_text('{"rows": []}')
    with pytest.raises(SystemExit, match="has no steps"):
        first_contact.main(["--results", str(tmp_path)])


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_loses_nothing(sent: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    script = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import first_contact
fake = lambda path, seconds: [sys.executable, {str(tmp_path / "fake.py")!r}, str(path), "fine,hangs"]
first_contact.command_of = lambda step: fake
sys.exit(first_contact.main(["--results", {str(tmp_path)!r}, "--only", "checks,tune"]))
"""
    path = tmp_path / "first_contact.json"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    for _ in range(600):
        entry = json.loads(path.read_text())["steps"].get("checks") if path.exists() else None
        if entry and statuses(entry).get("hangs") == "running" and (tmp_path / "pid").exists():
            break
        time.sleep(0.05)
    process.send_signal(sent)
    said, _ = process.communicate(timeout=60)
    if sent == signal.SIGKILL:  # which leaves the step running
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    record = json.loads(path.read_text())
    assert statuses(record["steps"]["checks"])["fine"] == "ok"
    assert "tune" not in record["steps"]
    if sent == signal.SIGTERM:
        assert process.returncode == 130
        assert "checks: hangs: running" in said


WORK = journal.Work(device="cpu", seconds=60)
BF16 = torch.bfloat16


def test_checks_on_engines_of_a_cpu() -> None:
    found = {name: measure for name, measure in steps.checks(WORK).items() if name.startswith(("cpu", "reference"))}
    assert len(found) == 2 * len(steps.ASKED)
    for measure in found.values():
        assert set(measure()["kernels"]) == {1, 16, 64, 96, 256}
    with pytest.raises(journal.Refused, match="1x128 activations"):
        steps.checked("torch", SCHEMES["weight_only"], "cpu")


@pytest.mark.parametrize("name", list(steps.ASKED))
def test_exact_products_on_engines_of_a_cpu(name: str) -> None:
    for engine in ("cpu", "reference"):
        for m in (1, 16, 96):
            assert steps.products(WORK)[f"{engine} {name} M={m}"]()["kernel"]


class OffByOne(ReferenceEngine):
    def linear(self, x, weight, bias, out_dtype):
        y = super().linear(x, weight, bias, out_dtype)
        y[-1, -1] += 1
        return y


class Narrow(ReferenceEngine):
    """Keeps 14 bits of a sum after every 32 products, and float32 from 128 to 128 if it is to be precise."""

    def linear(self, x, weight, bias, out_dtype):
        rounded = self.rounded(x, weight).float()
        w = dequantize(ScaledTensor(weight.data, weight.scale, weight.scheme.weight))
        y = part = torch.zeros(x.shape[0], weight.n)
        for start in range(0, weight.k, 32):
            part = bits(part + rounded[:, start : start + 32] @ w[:, start : start + 32].t(), 14)
            if weight.accumulate == "precise" and start % 128 == 96:
                y, part = y + part, torch.zeros_like(part)
        return (y + part).to(out_dtype)


def bits(y: torch.Tensor, count: int) -> torch.Tensor:
    mantissa, exponent = torch.frexp(y)
    return torch.ldexp((mantissa * 2.0**count).trunc(), exponent - count)


class Forgetful(ReferenceEngine):
    def linear(self, x, weight, bias, out_dtype):
        return super().linear(x, weight, bias, out_dtype).nan_to_num(448, 448, -448)


class WrongBits(ReferenceEngine):
    """As torch's row-wise kernel before 2.14: bfloat16's bits where float16 is asked for."""

    def linear(self, x, weight, bias, out_dtype):
        return super().linear(x, weight, bias, BF16).view(torch.int16).view(out_dtype)


def test_a_wrong_product_is_told() -> None:
    expected = r"1 of 8192 outputs are wrong by reference, the first is y\[15, 511\] = "
    with pytest.raises(ArithmeticError, match=expected):
        steps.product(OffByOne(), SCHEMES["row"], 16, "cpu")


def test_bits_of_accumulators() -> None:
    for name in ("row", "block"):
        full = probes.accumulator(ReferenceEngine(), name, 16, "cpu")
        assert {full["fast, across 256 products"], full["precise, across 256 products"]} == {24}
        narrow = probes.accumulator(Narrow(), name, 16, "cpu")
        assert narrow["fast, across 256 products"] == 14
        assert narrow["precise, across 256 products"] == 24
    assert probes.kept_bits(torch.zeros(2, 128)) == "below 9"
    own = probes.of_own_kernel(OnHopper(), "block", "cpu")
    assert (own["kernel"], own["fast, across 256 products"]) == ("triton blocks", 24)


def test_special_values_and_float16() -> None:
    for name in SCHEMES:
        assert probes.special_values(ReferenceEngine(), name, "cpu") == {"tokens": [1, 16, 256]}
    lost = "nan is lost at M = 1; inf is lost at M = 1; NaN in a weight reaches 0 outputs instead of 1 at M = 1; "
    with pytest.raises(ArithmeticError, match=lost):
        probes.special_values(Forgetful(), "row", "cpu")
    assert max(probes.float16(ReferenceEngine(), "cpu")["errors"].values()) < 1e-3
    with pytest.raises(ArithmeticError, match="relative errors by M"):
        probes.float16(WrongBits(), "cpu")


def test_torchs_own_products_are_there_or_not() -> None:
    x = w = ScaledTensor(torch.ones(4, 4).to(torch.float8_e4m3fn), torch.ones(4, 1), SCHEMES["row"].weight)
    assert probes.asked(lambda: torch.full((4, 4), 4.0), x, w) == {"error": 0}

    def missing() -> torch.Tensor:
        raise RuntimeError("rowwise is  not supported")

    with pytest.raises(journal.Refused, match="rowwise is not supported"):
        probes.asked(missing, x, w)
    with pytest.raises(ArithmeticError, match=r"relative error 2\.5e-01"):
        probes.asked(lambda: torch.full((4, 4), 5.0), x, w)


def test_compiled_models() -> None:
    assert probes.compiled("cpu", backend="eager")["errors"] == [0] * 4


class OnHopper(TritonEngine):
    """Computes products with the reference engine, as if on an H100; ``rows`` takes no tokens."""

    def place(self, device):
        return place((9, 0))

    def rejects(self, spec, machine):
        return []

    def linear(self, x, weight, bias, out_dtype):
        if self.plan(x.shape[0], weight, x.dtype).path == "rows":
            raise RuntimeError("out of resource: shared memory")
        like: PackedWeight = replace(weight, scheme=self.rounds(x.shape[0], weight, x.dtype))
        return ReferenceEngine().linear(x, like, bias, out_dtype)


def test_every_path_of_the_triton_engine_has_a_product() -> None:
    for name, m, paths in (
        ("row", 1, ["rows", "tokens", "library"]),
        ("static tensor", 96, ["rows", "tokens", "dense"]),
        ("block", 64, ["tokens", "library"]),
        ("weight_only", 256, ["dense"]),
        ("mx", 16, []),
    ):
        found = steps.other_paths(OnHopper(), steps.ASKED[name], m, "cpu")
        assert [plan.path for plan in found] == paths, (name, m)
        for plan in found:
            if plan.path != "rows":
                assert steps.product(steps.held(OnHopper(), plan), steps.ASKED[name], m, "cpu")


def test_plans_are_timed_beside_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "COLD_BYTES", 1)
    found = steps.plans_timed(OnHopper(), Cell(kind="row", n=256, k=512, m=4), "cpu")
    plans = {plan["path"]: plan for plan in found["plans"]}
    assert list(plans) == ["tokens", "rows", "vectors", "library", "bf16"]
    assert found["formula"] == plans["tokens"]["plan"]
    assert all((plan["us"] or 0) > 0 for path, plan in plans.items() if path != "rows")
    assert (plans["rows"]["us"], plans["rows"]["note"]) == (None, "RuntimeError: out of resource: shared memory")


def test_host_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = steps.host(64, 64, 4, "cpu")
    assert list(found["us"]) == ["F.linear", "bound call", "operation", "x.neg()"]
    assert min(found["us"].values()) > 0


def test_the_table_begins_with_what_tells_most() -> None:
    names = list(steps.table(WORK))
    assert names[:3] == ["row o 4096x4096 M=1", "row o 4096x4096 M=64", "row o 4096x4096 M=4096"]
    assert len(names) == len(set(names)) == 5 * 2 * len(steps.TABLE_TOKENS)
    assert len(steps.grouped(WORK)) == 4 * 3


@pytest.mark.parametrize(("died", "peers"), [((), "peers"), (("row o 4096x4096 M=1",), None)])
def test_peers_that_kill_the_process_are_left_out(
    died: tuple[str, ...], peers: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "peers", lambda: "peers")
    monkeypatch.setattr(steps, "Operands", lambda case: case)
    monkeypatch.setattr(steps.gpu, "measure", lambda case, peers, repeats, skip: [case.m, peers])
    rows = steps.table(replace(WORK, died=died))
    assert rows["block qkv 6144x4096 M=16"]() == {"measured": [16, peers]}


def test_whole_models() -> None:
    rows = steps.model("llama-decode", "cpu", "--tiny", "--blocks", "1", "--seconds", "0")["measured"]
    assert {(row["case"], row["tokens"], row["mode"]) for row in rows} == {("llama-decode", 1, "eager")}
    assert {row["name"] for row in rows if "ms" in row} >= {"bf16", "fp8gemm auto"}


TESTS = """
import os, pytest
lost = []
def card():
    if lost: raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_good(): card()
@pytest.mark.parametrize("shape", [(1, 2)], ids=str)
def test_kills(shape): os.abort()
def test_breaks():
    lost.append(1)
    card()
def test_wrong(): assert 1 == 2, "one is not two"
def test_wrong_it_is_not(): card()
@pytest.mark.skip
def test_left_out(): pass
def test_last(): card()
"""


def test_tests_that_kill_pytest_or_break_the_card(tmp_path: Path) -> None:
    (tmp_path / "test_card.py").write_text(TESTS)
    with pytest.raises(journal.Wrong) as told:
        pytests.outcomes(["test_card.py"], time.monotonic() + 300, root=tmp_path)
    assert told.value.found["counts"] == {
        **{"passed": 3, "killed pytest": 1, "broke the card": 1, "failed": 1, "skipped": 1}
    }
    bad = {test["test"]: test for test in told.value.found["tests"]}
    assert bad["test_card.py::test_kills[(1, 2)]"]["outcome"] == "killed pytest"
    assert "illegal memory access" in bad["test_card.py::test_breaks"]["why"]
    assert "one is not two" in bad["test_card.py::test_wrong"]["why"]


def test_tests_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(journal.Wrong, match="pytest finds no test") as told:
        pytests.outcomes(["test_none.py"], time.monotonic() + 300, root=tmp_path)
    assert "test_none.py" in told.value.found["output"]
    (tmp_path / "test_good.py").write_text("def test_good(): pass\n")
    assert pytests.outcomes(["test_good.py"], time.monotonic() + 300, root=tmp_path) == {"counts": {"passed": 1}}


def test_what_pytest_said_until_its_time_was_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = {
        True: ("test_a.py::test_good\ntest_a.py::test_slow[(1, 2)]\ntest_a.py::test_last\n\n3 tests collected\n", True),
        False: ("test_a.py::test_good PASSED [ 33%]\ntest_a.py::test_slow[(1, 2)] ", False),
    }
    monkeypatch.setattr(pytests, "said", lambda arguments, end, root: said["--collect-only" in arguments])
    with pytest.raises(journal.Wrong, match="1 passed, 1 not finished, 1 not run") as told:
        pytests.outcomes(["test_a.py"], time.monotonic() - 1, root=tmp_path)
    assert told.value.found["tests"][0]["test"] == "test_a.py::test_slow[(1, 2)]"


def test_files_of_tests_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    seen: list[tuple[str, float]] = []
    monkeypatch.setattr(pytests.time, "monotonic", lambda: now)
    monkeypatch.setattr(pytests, "outcomes", lambda arguments, end: seen.append((arguments[0], end)) or {})
    for measure in pytests.tests(replace(WORK, seconds=1005)).values():
        measure()
        now = seen[-1][1]
    assert [Path(file).name for file, _ in seen] == ["test_gpu.py", "test_engines.py", "test_tune.py"]
    assert [end for _, end in seen] == pytest.approx([700, 1000, 1100])
    assert all((BENCHMARKS.parent / file).is_file() for file, _ in seen)


def entry(step: str, rows: list[Row], **more: Any) -> Row:
    place = {"card": "NVIDIA H100", "torch": "2.11.0+cu130"}
    return {"step": step, "what": "", "status": "ok", "seconds": 1.0, "note": "", "place": place, "rows": rows, **more}


def timed(name: str, m: int, us: float) -> Row:
    case = {"kind": "row", "model": "llama-8b", "layer": "o", "n": 4096, "k": 4096, "m": m, "experts": 0}
    return {**case, "name": name, "graph us": us, "host us": 5.0}


def paths(m: int, formula: str, **us: float | None) -> Row:
    plans = [{"plan": f"{path} 16x64", "path": path, "us": time, "note": ""} for path, time in us.items()]
    found = {"kind": "row", "n": 4096, "k": 4096, "m": m, "formula": f"{formula} 16x64", "plans": plans}
    return {"row": f"paths row M={m}", "status": "ok", "found": found}


RECORD = {
    "date": "2026-12-01",
    "steps": {
        "checks": entry(
            "checks",
            [
                {"row": "vllm mx", "status": "refused", "note": "vLLM is not installed"},
                {"row": "triton mx", "status": "ok", "seconds": 8.04, "found": {}},
            ],
        ),
        "sanitized": entry(
            "sanitized",
            [
                {"row": "triton row M=1", "status": "failed", "note": "", "sanitizer": ["Invalid __global__ read"]},
                {"row": "triton row M=16", "status": "died", "note": "killed by SIGSEGV"},
            ],
            status="failed",
        ),
        "tests": entry(
            "tests",
            [
                {
                    "row": "test_gpu.py",
                    "status": "failed",
                    "note": "9 passed, 1 failed",
                    "found": {
                        "counts": {"passed": 9, "failed": 1},
                        "tests": [{"test": "test_gpu.py::test_a", "outcome": "failed", "why": "not equal"}],
                    },
                }
            ],
        ),
        "probes": entry(
            "probes",
            [
                {
                    "row": "rates",
                    "status": "ok",
                    "found": {
                        **{"bytes per second": 3.2e12, "assumed bytes per second": 4e12},
                        **{"bf16 per second": 8e14, "assumed bf16 per second": 8e14},
                    },
                },
                {"row": "accumulator triton row M=256", "status": "ok", "found": {"fast, within 32 products": 14}},
                {"row": "torch blocks", "status": "refused", "note": "only on 9.0"},
            ],
        ),
        "table": entry(
            "table",
            [
                {
                    "row": f"M={m}",
                    "status": "ok",
                    "found": {
                        "measured": [
                            timed("bf16", m, 20.0),
                            timed("fp8gemm auto", m, 10.0),
                            timed("fp8gemm triton", m, 10.0),
                            timed("fp8gemm torch", m, us),
                            {**timed("deep_gemm", m, 0), "note": "no kernel", "graph us": None},
                        ][: 4 if m == 1024 else 5]
                    },
                }
                for m, us in ((16, 40.0), (1024, 8.0))
            ],
        ),
        "variants": entry(
            "variants",
            [
                {"row": "host 4096x4096 M=1", "status": "ok", "found": {"us": {"F.linear": 4.5, "bound call": 5.5}}},
                paths(32, "tokens", tokens=6.0, library=9.0),
                paths(64, "tokens", tokens=9.0, library=7.0),
                paths(128, "library", tokens=12.0, library=8.0, rows=7.5),
            ],
        ),
    },
}


def test_the_page() -> None:
    record = json.loads(json.dumps(RECORD))
    for row in record["steps"]["table"]["rows"]:
        for candidate in row["found"]["measured"]:
            if candidate["graph us"] is None:
                del candidate["graph us"]
    text = page.page(record)
    for line in (
        "card NVIDIA H100, torch 2.11.0+cu130",
        "vLLM is not installed: vllm mx",
        "triton mx 8.0",
        "sanitized: triton row M=16: died: killed by SIGSEGV",
        "    Invalid __global__ read",
        "    test_gpu.py::test_a: failed: not equal",
        "test_gpu.py: 9 passed, 1 failed",
        "accumulator triton row M=256: fast, within 32 products 14",
        "only on 9.0: torch blocks",
        "bytes per second: 3.2e+12, 0.80 x the assumed 4e+12",
        "deep_gemm, 1 times: no kernel",
        "row, M <= 64: triton 1.00, torch 4.00 (1 products): as auto tries them",
        "row, M > 64: torch 1.00, triton 1.25 (1 products): auto tries triton, torch",
        "row 4096 x 4096, M = 1024: torch 8.0 us, auto 10.0 us",
        "row 4096 x 4096, M = 64: library 16x64 7.0 us; tokens 16x64 9.0 us",
    ):
        assert line in text.splitlines(), line
    goals = next(line for line in text.splitlines() if "row: 1.55 x bf16 at M >= 1024" in line)
    assert goals.split()[-3:] == ["1", "0", "0"]
    (switch,) = (line for line in text.splitlines() if "activations as they are" in line)
    assert "vectors/tokens at 32; rows/library at 64, 128" in switch
    assert "vectors/tokens at 32, 64; rows/library at 128" in switch
    assert switch.endswith("differs at M = 64")
    (own,) = (line for line in text.splitlines() if "our product, or torch's" in line)
    assert own.endswith("differs at M = 128")
    assert "bound call" in text


def test_a_difference_within_noise_changes_nothing() -> None:
    cells = [paths(64, "tokens", tokens=10.0, rows=9.9)["found"], paths(128, "rows", tokens=20.0, rows=10.0)["found"]]
    switch = next(switch for switch in page.SWITCHES if "as they are" in switch.what)
    assert page.switched(switch, cells)["verdict"] == "as measured"
    assert page.switched(switch, [paths(64, "tokens", tokens=10.0, rows=None)["found"]]) is None


def test_the_engines_exist() -> None:
    assert probes.engines_of("cuda") == ["triton", "vllm", "torch", "deep_gemm"]
    assert set(probes.engines_of("cuda")) | {"cpu", "reference"} == set(ENGINES)
