"""The report of a checkpoint, from Python's internals and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fp8gemm import enable_fp8_gemm, open_checkpoint, save_checkpoint
from fp8gemm.checkpoint.outline import outline
from fp8gemm.cli import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = nn.Sequential(*(nn.Linear(64, 32) if at % 2 == 0 else nn.Linear(32, 64) for at in range(12))).bfloat16()
    enable_fp8_gemm(model, module_filter="!3")
    save_checkpoint(model, tmp_path / "fp8")
    return tmp_path / "fp8"


def test_each_matrix_has_a_row(folder: Path) -> None:
    found = outline(open_checkpoint(folder))
    assert [row.name for row in found.rows] == [str(at) for at in range(12)]
    assert [row.name for row in found.kept] == ["3"]
    assert found.kept[0].reason == "bfloat16 in the checkpoint"
    row = found.rows[0]
    assert (row.shape, row.bytes_before, row.bytes_after) == ((32, 64), 2 * 32 * 64, 32 * 64 + 4 * 32)
    assert found.bytes_before == 12 * 2 * 32 * 64
    assert found.bytes_after == 2 * 32 * 64 + 11 * 32 * 64 + 4 * (6 * 32 + 5 * 64)
    assert found.to_dict()["format"] == "compressed-tensors"


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.html"
    assert main(["report", str(folder), "--html", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}: compressed-tensors"
    assert lines[1].split("  ")[0] == "layer"
    assert lines[2].split() == ["0", "32x64", "0.00", "0.00", "weight", "row,", "activation", "row"]
    assert lines[-1].split()[:5] == ["11", "on", "FP8,", "1", "dense"]
    text = file.read_text()
    assert "11 of 12" in text
    assert "bfloat16 in the checkpoint" in text
    assert "calls" not in text
    assert "forward pass" not in text
    assert main(["report", str(folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 12
    assert main(["report", str(folder), "--html", str(tmp_path / "none" / "page.html")]) == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_checkpoints_without_fp8_or_matrices(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(4, 4), "a.bias": torch.ones(4)}, tmp_path / "dense.safetensors")
    found = outline(open_checkpoint(tmp_path / "dense.safetensors"))
    assert [(row.name, row.reason) for row in found.rows] == [("a", "float32 in the checkpoint")]
    assert "0 of 1" in found.to_html()
    save_file({"a.bias": torch.ones(4)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"none.safetensors has no matrices, only 1 tensors"):
        outline(open_checkpoint(tmp_path / "none.safetensors"))
