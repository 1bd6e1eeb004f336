"""examples/tune.py finds a recipe for real weights, and the patched model follows it."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "tune.py"


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "0.0012"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    value, kept = (
        re.match(r"distance ([\d.]+), asked for at most 0\.0012: ", said),
        said.count("kept: kept by the recipe"),
    )
    assert value is not None
    assert 0.0001 < float(value[1]) <= 0.0012
    assert 0 < kept < 37
    assert f"{37 - kept} converted, {kept} kept" in said
    (counts,) = re.findall(rf"chosen +\S+ +{re.escape(value[1])} +(.*)", said)
    assert sorted(counts.split(", ")) == sorted([f"{37 - kept} row", f"{kept} original"])
