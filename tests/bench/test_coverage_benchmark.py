"""benchmarks/coverage.py: its reports for models that run, that fail, and that differ after patching."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from fp8gemm import FP8Weight

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("coverage")
    finally:
        sys.path.remove(str(BENCHMARKS))


class Different(nn.Linear):
    """Computes something else once its weight is FP8."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if isinstance(self.weight, FP8Weight) else 1)


class Failing(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.weight, FP8Weight):
            raise TypeError("no such weight")
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:nothing to convert")
def test_torchs_own_modules(coverage: ModuleType) -> None:
    rows = {name: coverage.measure(name, make) for name, make in coverage.cases() if name.startswith("torch/")}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert all(row["dequantized"] == 0 for row in rows.values())
    low = {name for name, row in rows.items() if row["fp8"] < 0.99}
    assert low == {"torch/Conv2d 3x3", "torch/LSTM", "torch/GRU"}
    assert "windows overlap" in rows["torch/Conv2d 3x3"]["left"]
    assert f"{len(rows) - 3} at least 99 % on FP8" in coverage.summary(list(rows.values()))


@pytest.mark.parametrize(
    ("kind", "status"),
    [(Different, "FAILED: it differs"), (Failing, "FAILED: TypeError: no such weight"), (None, "skipped: no class")],
)
def test_what_goes_wrong_is_told(coverage: ModuleType, kind: Any, status: str) -> None:
    def make() -> Any:
        if kind is None:
            raise ValueError("no class")
        return nn.Sequential(nn.Linear(16, 16), kind(16, 16)).eval(), (torch.randn(2, 16),), {}

    assert coverage.measure("case", make)["status"].startswith(status)


def test_distances_are_of_what_is_finite_in_both(coverage: ModuleType) -> None:
    x = torch.tensor([3.0, float("-inf"), 4.0])
    assert coverage.apart([x], [x]) == 0
    assert coverage.apart([x * 1.5], [x]) == 0.5
    assert coverage.apart([x.nan_to_num()], [x]) == float("inf")


def test_saved_rows_stay_where_they_are_not_measured_again(
    coverage: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "RESULTS", tmp_path)
    monkeypatch.setattr(
        coverage, "save", lambda name, rows, **more: (tmp_path / "new.json").write_text(json.dumps(rows))
    )
    (tmp_path / "old.json").write_text(json.dumps({"rows": [{"name": "torch/another", "status": "ok"}]}))
    monkeypatch.setattr(sys, "argv", ["coverage.py", "torch/Linear", "--save", "old"])
    coverage.main()
    assert [row["name"] for row in json.loads((tmp_path / "new.json").read_text())] == ["torch/Linear", "torch/another"]
