"""The parts of benchmarks/gpu_models.py that need no GPU: the blocks, its arguments, and a small complete run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import BENCHMARKS, load
from torch import nn

gpu_models, gpu_blocks = load("gpu_models"), load("gpu_blocks")


@pytest.mark.parametrize(
    ("case", "shapes"),
    [
        ("llama-decode", {(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)}),
        ("flux-4096", {(9216, 3072), (21504, 3072), (3072, 15360)}),
    ],
)
def test_blocks_have_the_linears_of_the_models(case: str, shapes: set[tuple[int, int]]) -> None:
    with torch.device("meta"):
        kind, sizes, tokens = gpu_models.CASES[case].kind, gpu_models.CASES[case].sizes, gpu_models.CASES[case].tokens
        model = kind(sizes, tokens)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert {(linear.out_features, linear.in_features) for linear in linears} == shapes
    assert len(linears) == 4 * (7 if case == "llama-decode" else 3)


def test_decoding_attends_to_the_cache_and_writes_its_last_position() -> None:
    case = gpu_models.tiny(gpu_models.CASES["llama-decode"])
    model, x = gpu_blocks.built(case.kind, case.sizes, case.tokens, "cpu")
    attention = model.layers[0].self_attn
    before = attention.keys.clone()
    with torch.no_grad():
        y = model(x)
        assert torch.equal(model(x), y)
        changed = (attention.keys != before).any(dim=-1).any(dim=1)[0]
        assert changed.tolist() == [False] * 31 + [True]
        attention.values[:, :, 0] += 10
        assert not torch.equal(model(x), y)


def test_prefill_is_causal() -> None:
    case = gpu_models.tiny(gpu_models.CASES["llama-prefill"])
    model, x = gpu_blocks.built(case.kind, case.sizes, case.tokens, "cpu")
    with torch.no_grad():
        y = model(x)
        x[:, -1] += 1
        changed = (model(x) != y).any(dim=-1)[0]
    assert changed.tolist() == [False] * 31 + [True]


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_models.parse([]).save == "gpu_models"
    assert gpu_models.parse(["--tiny"]).save is None
    assert gpu_models.parse(["--cases", "flux-1024"]).cases == ["flux-1024"]
    with pytest.raises(SystemExit):
        gpu_models.parse(["--cases", "bert"])
    assert "found bert" in capsys.readouterr().err


def test_ratios_are_within_a_mode() -> None:
    rows = [
        {"name": "bf16", "mode": "eager", "ms": 6.0},
        {"name": "bf16", "mode": "graph", "ms": 4.0},
        {"name": "a", "mode": "eager", "ms": 3.0},
        {"name": "a", "mode": "graph", "ms": 2.5},
        {"name": "a", "mode": "compiled", "ms": 1.0},
        {"name": "b", "mode": "eager", "note": "wrong"},
    ]
    assert [row.get("x bf16") for row in gpu_models.with_ratios(rows)] == [1.0, 1.0, 2.0, 1.6, None, None]


def test_what_is_far_off_is_not_timed() -> None:
    expected = torch.ones(2, 2)
    assert gpu_models.checked(lambda: torch.full((2, 2), 1.1), expected) == {"error": pytest.approx(0.1)}
    assert gpu_models.checked(lambda: torch.full((2, 2), 1.2), expected)["note"] == "wrong, and so not timed"
    assert gpu_models.checked(lambda: torch.full((2, 2), torch.nan), expected)["note"] == "wrong, and so not timed"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / "gpu_models.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_tiny_run_from_end_to_end(tmp_path: Path) -> None:
    small = ("--device", "cpu", "--tiny", "--blocks", "1", "--seconds", "0")
    done = run(*small, "--save", "try", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "try.json").read_text())
    assert written["tiny"] is True
    assert written["goals"] == []
    assert {row["case"] for row in written["rows"]} == set(gpu_models.CASES)
    assert {row["mode"] for row in written["rows"]} == {"eager"}
    timed = {(row["case"], row["name"]): row for row in written["rows"] if "ms" in row}
    for case in gpu_models.CASES:
        assert timed[case, "bf16"]["error"] == 0
        assert 0 < timed[case, "fp8gemm auto"]["error"] < 0.15
        assert timed[case, "fp8gemm auto"]["runs"]
    for case in ("llama-prefill", "llama-decode"):
        auto, fused = timed[case, "fp8gemm auto"], timed[case, "fp8gemm auto, fused"]
        assert fused["error"] == pytest.approx(auto["error"], rel=0.1)
    assert "fp8gemm auto, fused" in done.stdout


def test_without_a_card_it_says_so() -> None:
    done = run("--cases", "flux-1024")
    assert done.returncode == 1
    assert "1 cases, but no CUDA card" in done.stderr
