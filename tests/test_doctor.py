"""What ``fp8gemm doctor`` says of a machine: engines are probed in a process of their own, and known problems apply."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fp8gemm import ENGINES, Machine, doctor
from fp8gemm.cli import main
from fp8gemm.doctor.cases import CASES
from fp8gemm.doctor.known import known_problems

BROKEN = ("wrong", "crashing", "endless", "raising")


@pytest.fixture(scope="module")
def probed() -> tuple[doctor.ProbedProduct, ...]:
    """What is found of the engines here and of four broken ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        return doctor.probe_engines(["cpu"], imports=["broken_engines"], case_seconds=4)


def of(probed: tuple[doctor.ProbedProduct, ...], engine: str) -> dict[str, tuple[str, str]]:
    return {row.case: (row.status, row.note) for row in probed if row.engine == engine and row.scheme == "row"}


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_right_engines_are_exact_beside_broken_ones(probed: tuple[doctor.ProbedProduct, ...], engine: str) -> None:
    rows = [row for row in probed if row.engine == engine]
    assert len(rows) == 6 * len(CASES)
    assert {(row.status, row.note) for row in rows} == {("exact", "")}
    assert all(row.seconds > 0 for row in rows)
    assert not any(row.bad for row in rows)


def test_a_wrong_number_is_found_and_the_other_products_are_right(probed: tuple[doctor.ProbedProduct, ...]) -> None:
    rows = of(probed, "wrong")
    assert rows["one row"] == ("exact", "")
    for case in CASES:
        if case not in ("one row", "experts"):
            assert rows[case][0] == "wrong", case
    assert "is exact, 4 tokens of K = 16384" in rows["large K"][1]
    assert "for 16 tokens gives" in rows["its own check"][1]


def test_a_crash_is_a_row(probed: tuple[doctor.ProbedProduct, ...]) -> None:
    rows = of(probed, "crashing")
    assert rows["one row"] == ("exact", "")
    assert rows["zero rows"][0] == "died"
    if os.name == "posix":
        assert rows["zero rows"][1].startswith("SIGSEGV: Fatal Python error: Segmentation fault, File ")
    rest = {rows[case] for case in ("NaN in one row", "odd sizes", "large K")}
    assert rest == {("not run", "died before, under row, zero rows")}


def test_a_hang_is_a_row(probed: tuple[doctor.ProbedProduct, ...]) -> None:
    rows = of(probed, "endless")
    assert rows["odd sizes"] == ("exact", "")
    assert rows["large K"] == ("timed out", "no end in 4 s")


def test_an_exception_is_a_row_and_a_refusal_is_no_fault(probed: tuple[doctor.ProbedProduct, ...]) -> None:
    rows = of(probed, "raising")
    assert rows["zero rows"] == ("failed", "RuntimeError: no kernel image is available")
    assert rows["its own check"][0] == "failed"
    assert rows["odd sizes"] == ("refused", "takes no narrow weights")
    bad = {row.engine for row in probed if row.bad}
    assert bad & {"cpu", "reference", *BROKEN} == set(BROKEN)


def test_the_table_names_what_is_not_exact(probed: tuple[doctor.ProbedProduct, ...]) -> None:
    found = doctor.Examination(versions={}, native="", devices={}, probed=probed)
    assert found.failed
    text = str(found)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "crashing, row, zero rows: died: SIGSEGV: Fatal Python error: Segmentation fault" in text or os.name == "nt"
    assert "endless, row, large K: timed out: no end in 4 s" in text
    assert "cpu wrong 5 wrong, 1 exact" in lines
    assert "not run:" not in text
    assert json.loads(json.dumps(found.to_dict()))["probed"][0]["device"] == "cpu"


def test_a_probe_that_cannot_start_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN_AT_IMPORT", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    (row,) = doctor.probe_engines(imports=["broken_engines"])
    assert row.status == "died"
    assert row.note == "exit status 1: OSError: libbroken.so: undefined symbol"
    assert row.bad
    assert not row.fatal


def test_an_engine_that_crashes_when_it_is_looked_for_does_not_end_the_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BROKEN_WHEN_LOOKED_FOR", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    assert main(["doctor", "--import", "broken_engines"]) == 1
    out = capsys.readouterr().out
    assert "looking for the engines: died: " in out
    assert "choice.py" in out
    assert "\ncpu: " not in out


def test_the_command_probes_the_cpu_and_fails_if_an_engine_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def probe_engines(devices: object, *, imports: object) -> tuple[doctor.ProbedProduct, ...]:
        asked.append(([str(device) for device in devices], imports))
        row = {"device": "cpu", "engine": "mine", "scheme": "row", "case": "one row"}
        return (doctor.ProbedProduct(**row, status="wrong" if imports else "exact", note="gives 1 where 2 is exact"),)

    monkeypatch.setattr("fp8gemm.doctor.examination.probe_engines", probe_engines)
    assert main(["doctor"]) == 0
    assert main(["doctor", "--import", "mine", "--json"]) == 1
    assert main(["doctor", "--probe", "none"]) == 0
    assert asked == [(["cpu"], []), (["cpu"], ["mine"])]
    assert "mine, row, one row" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="probe must be one of none, cpu, all, found 'gpu'"):
        doctor.examine(probe="gpu")


CARDS = {
    "4090": {"capability": (8, 9), "torch_version": (2, 11), "cuda_version": (13, 0)},
    "4090, newest": {"capability": (8, 9), "torch_version": (2, 14), "cuda_version": (13, 0)},
    "H100": {"capability": (9, 0), "torch_version": (2, 14), "cuda_version": (12, 9)},
    "A100": {"capability": (8, 0), "torch_version": (2, 14), "cuda_version": (12, 9)},
    "B300": {"capability": (10, 3), "torch_version": (2, 14), "cuda_version": (13, 0)},
    "5090": {"capability": (12, 0), "torch_version": (2, 10), "cuda_version": (13, 0)},
    "GB10": {"capability": (12, 1), "torch_version": (2, 14), "cuda_version": (13, 0)},
}


@pytest.mark.parametrize(
    ("card", "vllm", "numbers"),
    [
        ("4090", False, {"243", "187569", "310"}),
        ("4090, newest", True, {"310", "58241"}),
        ("H100", False, {"49932"}),
        ("H100", True, {"49932", "23280"}),
        ("A100", True, {"4319"}),
        ("B300", False, {"187095", "47030", "310"}),
        ("5090", False, {"192707", "187569", "310"}),
        ("GB10", True, {"310", "143"}),
    ],
)
def test_known_problems_of_cards(card: str, vllm: bool, numbers: set[str]) -> None:
    machine = Machine(device="cuda", system="linux", **CARDS[card])
    found = known_problems(machine, {"vllm": "0.33.0" if vllm else None})
    assert {problem.source.rsplit("/", 1)[1] for problem in found} == numbers


def test_known_problems_elsewhere() -> None:
    windows = Machine(device="cuda", capability=(8, 9), torch_version=(2, 14), cuda_version=(13, 0), system="win32")
    assert "torch on Windows" in {problem.combination for problem in known_problems(windows, {})}
    mi300 = Machine(device="rocm", features=frozenset({"gfx942"}), system="linux")
    assert [problem.combination for problem in known_problems(mi300, {})] == ["ROCm on gfx942 (MI300)"]
    radeon = Machine(device="rocm", features=frozenset({"gfx1200"}), system="win32")
    assert [problem.source.rsplit("/", 1)[1] for problem in known_problems(radeon, {})] == ["4079"]


def test_each_known_problem_has_its_source() -> None:
    sources = [problem.source for problem in doctor.KNOWN]
    assert len(sources) == len(set(sources))
    assert all(source.startswith("https://github.com/") and source.rsplit("/", 1)[1].isdigit() for source in sources)


def test_what_applies_here_is_shown_and_in_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--probe", "none", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["probed"] == []
    assert set(facts["versions"]) == {"python", "torch", "cuda", "triton", "vllm"}
    (problem,) = facts["devices"]["cpu"]["problems"]
    assert set(problem) == {"combination", "happens", "works", "source"}
    assert set(facts["devices"]["cpu"]["engines"]) == set(ENGINES)
    assert main(["doctor", "--probe", "none"]) == 0
    out = capsys.readouterr().out
    assert problem["source"] in out
    assert "exact products" not in out
