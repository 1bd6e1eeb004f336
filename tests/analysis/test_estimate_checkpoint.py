"""What FP8 would save in a checkpoint, against what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write

from fp8gemm import open_checkpoint, quantize_checkpoint
from fp8gemm.analysis.checkpoints import estimate_checkpoint
from fp8gemm.cli import main


def checkpoint_at(folder: Path) -> Path:
    tensors = {
        "model.embed_tokens.weight": torch.randn(48, 32).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(256, 160).bfloat16(),
        "model.layers.0.mlp.gate.weight": torch.randn(4, 160),
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(4, 64, 32).bfloat16(),
        "model.layers.0.mlp.experts.down_proj": torch.randn(4, 32, 32).bfloat16(),
        "model.layers.0.norm.weight": torch.ones(160).bfloat16(),
        "lm_head.weight": torch.randn(48, 32).bfloat16(),
    }
    return write(folder, tensors)


@pytest.mark.parametrize("scheme", ["row", "block", "tensor"])
@pytest.mark.parametrize("fp8_heads", [False, True])
def test_bytes_of_a_checkpoint_are_those_that_are_written(tmp_path: Path, scheme: Any, fp8_heads: bool) -> None:
    source = open_checkpoint(checkpoint_at(tmp_path / "in"))
    found = estimate_checkpoint(source, scheme=scheme, ignore=["*.experts.1.*"], fp8_heads=fp8_heads)
    written = quantize_checkpoint(
        source, tmp_path / "out", scheme=scheme, ignore=["*.experts.1.*"], fp8_heads=fp8_heads
    )
    assert (found.model_bytes_before, found.model_bytes_after) == (written.bytes_before, written.bytes_after)
    assert [row.name for row in found.converted] == list(written.layers)
    assert {row.name: row.reason for row in found.kept} == written.kept


def test_the_command_line_estimates_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint_at(tmp_path / "in")
    assert main(["estimate", str(folder), "--html", str(tmp_path / "page.html")]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "speed: not timed: a checkpoint does not run; fp8gemm.estimate(model, *inputs) times a model\n"
    )
    assert "kept: lm_head: an output head" in text
    assert "up_proj" in (tmp_path / "page.html").read_text()
    assert main(["estimate", "--json", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] is None
    quantize_checkpoint(folder, tmp_path / "fp8")
    assert main(["estimate", str(tmp_path / "fp8")]) == 1
    assert "is already FP8" in capsys.readouterr().err
