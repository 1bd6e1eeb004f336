"""The command line: what it prints and with what status it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import BLOCKS, compressed, fp8, scales, write

from fp8gemm.checkpoint import open_checkpoint
from fp8gemm.cli import main
from fp8gemm.engines import ENGINES


def folder_of(tmp_path: Path) -> Path:
    tensors = {
        "m.weight": fp8(192, 128),
        "m.weight_scale": scales(192, 1),
        "dense.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        "dense.weight_scale": torch.ones(4, 1),
        "a.k_scale": torch.ones(1),
    }
    return write(tmp_path / "in", tensors, {**compressed("channel", "token"), "ignore": ["m"]})


def test_inspect_says_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder_of(tmp_path))]) == 0
    text = capsys.readouterr().out
    assert "compressed-tensors (quant_method compressed-tensors)" in text
    assert "1 FP8 weights, 1 dense tensors" in text
    assert "1 x float8_e4m3fn, weight row, activation row, scales float32" in text
    assert "unused: dense.weight_scale: dense.weight is not FP8" in text
    assert "suspicious: m is FP8 although the config ignores it" in text
    assert "1 scales of a key-value cache" in text


def test_inspect_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json", str(folder_of(tmp_path))]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "compressed-tensors"
    assert facts["layers"]["m.weight"]["scale_shape"] == [192, 1]
    assert facts["bytes"] == 192 * 128 + 192 * 4 + 32 + 16 + 4
    assert list(facts["unused_keys"]) == ["dense.weight_scale"]


def test_inspect_checks_weights_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w = fp8(128, 128)
    w.view(torch.uint8)[5, 5] = 0x7F
    folder = write(tmp_path, {"m.weight": w, "m.weight_scale_inv": scales(1, 1)}, BLOCKS)
    assert main(["inspect", str(folder)]) == 0
    assert main(["inspect", "--check", str(folder)]) == 1
    assert "broken: m.weight holds 1 NaN bytes" in capsys.readouterr().out


def test_inspect_finds_broken_scales(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, {"m.weight": fp8(128, 128), "m.weight_scale_inv": torch.full((1, 1), torch.nan)}, BLOCKS)
    assert main(["inspect", str(folder)]) == 1
    assert "broken: m.weight_scale_inv" in capsys.readouterr().out


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "in", {"m.weight": fp8(128, 128), "m.weight_scale": scales(1, 1)},
                   compressed("block", "group", block_structure=[128, 128]))  # fmt: skip
    out = tmp_path / "out"
    assert main(["convert", str(folder), str(out)]) == 0
    assert "1 FP8 weights as compressed-tensors" in capsys.readouterr().out
    assert open_checkpoint(out).format.name == "compressed-tensors"


def test_quantize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"a.weight": torch.randn(128, 128), "b.weight": torch.randn(128, 128), "lm_head.weight": torch.ones(2, 2)}
    folder = write(tmp_path / "in", tensors)
    arguments = ["quantize", str(folder), str(tmp_path / "out"), "--scheme", "block", "--format", "fine-grained"]
    assert main([*arguments, "--ignore", "b", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layers"] == ["a"]
    assert facts["kept"] == {"b": "ignored by b", "lm_head": "ignored by *lm_head"}
    assert facts["bytes_after"] < facts["bytes_before"]
    assert main(arguments) == 0
    assert "dense: lm_head (ignored by *lm_head)" in capsys.readouterr().out


def test_what_cannot_be_done_ends_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "absent")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fp8gemm inspect: ")
    assert main(["inspect", "--json", str(tmp_path / "absent")]) == 1
    assert json.loads(capsys.readouterr().out)["kind"] == "CheckpointError"
    assert main(["convert", str(folder_of(tmp_path)), str(tmp_path / "out"), "--format", "fine-grained"]) == 1


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["quantize", "a", "b", "--scheme", "int4"]])
def test_wrong_arguments_end_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: fp8gemm" in capsys.readouterr().err


def test_doctor_tells_of_every_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["devices"]["cpu"]["engines"]) == set(ENGINES)
    assert facts["devices"]["cpu"]["choices"]["row, float32"] == "cpu"
    assert main(["doctor"]) == 0
    assert "row, bfloat16:" in capsys.readouterr().out
