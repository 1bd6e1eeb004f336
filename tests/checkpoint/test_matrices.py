"""Which matrices of a checkpoint are quantized, and what becomes of the others."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoints import write

from fp8gemm import open_checkpoint, quantize_checkpoint


def test_ignored_experts_of_a_stack_are_written_dense(tmp_path: Path) -> None:
    block = "model.layers.0.mlp.experts"
    gate_up, down = torch.randn(4, 64, 32).bfloat16(), torch.randn(4, 32, 32).bfloat16()
    write(tmp_path / "in", {f"{block}.gate_up_proj": gate_up, f"{block}.down_proj": down})
    ignored = {f"{block}.1.{name}_proj" for name in ("gate", "up", "down")}
    written = quantize_checkpoint(tmp_path / "in", tmp_path / "out", ignore=["*.experts.1.*"])
    assert (len(written.layers), set(written.kept)) == (9, ignored)
    found = open_checkpoint(tmp_path / "out")
    assert len(found.layers) == 9
    assert found[f"{block}.1.gate_proj.weight"].equal(gate_up[1, :32])
    assert found[f"{block}.1.up_proj.weight"].equal(gate_up[1, 32:])
    assert found[f"{block}.1.down_proj.weight"].equal(down[1])
