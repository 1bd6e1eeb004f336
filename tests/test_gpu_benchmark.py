"""What of benchmarks/gpu.py needs no card: its arguments, cases, floors, ratios, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCHMARKS))
    return module


def test_arguments(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = gpu.parse(["--kinds", "row,block", "--tokens", "1,64"])
    assert arguments.kinds == ["row", "block"]
    assert arguments.tokens == [1, 64]
    with pytest.raises(SystemExit):
        gpu.parse(["--models", "llama-8b,gpt-9"])
    assert "found gpt-9" in capsys.readouterr().err


def test_cases(gpu: ModuleType) -> None:
    cases = list(gpu.cases(list(gpu.KINDS), list(gpu.MODELS), [1, 64]))
    assert len(cases) == len(set(cases))
    assert {case.kind for case in cases} == set(gpu.KINDS)
    assert all((case.experts > 0) == (case.kind == "grouped") for case in cases)
    assert {(case.n, case.k) for case in cases} >= {(6144, 4096), (2112, 7168), (3072, 15360)}


def test_floors(gpu: ModuleType) -> None:
    """Those of the published table: 7.81 and 3.91 us at M = 1, 174 and 87.0 at M = 4096."""
    for m, bf16, fp8 in ((1, 7.81, 3.91), (4096, 174, 87.0)):
        floors = gpu.Case(kind="row", model="", layer="o", n=4096, k=4096, m=m).floors
        assert floors["bf16 floor us"] == pytest.approx(bf16, rel=2e-3)
        assert floors["fp8 floor us"] == pytest.approx(fp8, rel=2e-3)


def test_ratios(gpu: ModuleType) -> None:
    shape = {"m": 4, "n": 10, "k": 50}
    rows = gpu.with_ratios(
        [{**shape, "name": "bf16", "graph us": 8.0}, {**shape, "name": "a", "graph us": 4.0}, {**shape, "name": "b"}]
    )
    assert [row.get("x bf16") for row in rows] == [1.0, 2.0, None]
    assert rows[1]["TFLOP/s"] == pytest.approx(2 * 4 * 10 * 50 / 4e-6 / 1e12)


def test_peers_that_are_not_there_and_that_are(gpu: ModuleType, tmp_path: Path) -> None:
    assert gpu.load_peers(tmp_path / "none" / "peers.py") == (None, {"peers": "no none folder"})
    path = tmp_path / "peers.py"
    path.write_text("def load():\n    return {'a': True}, {'b': 'OSError: gone'}\n")
    peers, notes = gpu.load_peers(path)
    assert peers is not None
    assert notes == {"a": "loaded", "b": "OSError: gone"}


def test_what_is_written(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import harness

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    case = gpu.Case(kind="row", model="llama-8b", layer="o", n=4096, k=4096, m=4)
    rows = gpu.with_ratios(
        [
            {**vars(case), **case.floors, "name": "bf16", "graph us": 8.0},
            {**vars(case), **case.floors, "name": "a", "note": "not there"},
        ]
    )
    path = gpu.save("try", rows, card="X")
    written = json.loads(path.read_text())
    assert written["card"] == "X"
    assert written["date"]
    assert written["rows"] == rows
    pictures = gpu.plot(rows, "try", tmp_path)
    assert len(pictures) == (importlib.util.find_spec("matplotlib") is not None)
    assert all(picture.stat().st_size > 1000 for picture in pictures)


def test_without_a_card_it_says_so() -> None:
    command = [sys.executable, "gpu.py", "--kinds", "row", "--models", "flux", "--tokens", "1"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "5 cases, but no CUDA card" in done.stderr
