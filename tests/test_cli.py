"""The command line: its output and its exit status."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import BLOCKS, compressed, fp8, scales, write

from fp8gemm import native
from fp8gemm.bench import contest, plans
from fp8gemm.checkpoint import open_checkpoint
from fp8gemm.cli import main
from fp8gemm.engines import ENGINES, Machine, MatmulSpec, PackedWeight
from fp8gemm.engines.cpu import CpuEngine
from fp8gemm.engines.reference import ReferenceEngine
from fp8gemm.engines.triton import table as tables
from fp8gemm.engines.triton.engine import TritonEngine
from fp8gemm.engines.triton.plan import Place, place


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
    assert "1 KV cache scales" in text


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
    assert list(facts["kept"]) == ["b", "lm_head"]
    assert facts["bytes_after"] < facts["bytes_before"]
    assert main(arguments) == 0
    assert "dense: lm_head (an output head, which serving engines take dense; fp8_heads" in capsys.readouterr().out
    comfy = str(tmp_path / "net.safetensors")
    assert main(["convert", arguments[2], comfy, "--format", "comfy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [comfy]
    assert main([*arguments, "--fp8-heads", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == ["a", "b", "lm_head"]


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
    assert main(["doctor", "--probe", "none", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["devices"]["cpu"]["engines"]) == set(ENGINES)
    assert facts["devices"]["cpu"]["choices"]["row, float32"] == "cpu"
    assert main(["doctor", "--probe", "none"]) == 0
    assert "row, bfloat16:" in capsys.readouterr().out


def test_doctor_says_which_compiled_kernels_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their path, instruction level and origin, or why there are none."""
    library = native.Library(
        Path("/p/fp8gemm.so"), "from the cache, compiled by g++ 14.2.0", ("avx2",), "avx2", True, object()
    )
    for found, said in (
        (library, "/p/fp8gemm.so, avx2, from the cache, compiled by g++ 14.2.0"),
        (native.Unavailable("no C++ compiler"), "no C++ compiler"),
    ):
        monkeypatch.setattr(native, "find", lambda found=found: found)
        assert main(["doctor", "--probe", "none"]) == 0
        assert f"\ncompiled CPU kernels: {said}\n" in capsys.readouterr().out
        assert main(["doctor", "--probe", "none", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["native"] == said


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One copy of each weight, and an empty table."""
    monkeypatch.setattr(contest, "COLD_BYTES", 1)
    monkeypatch.setattr(native, "cache_directory", lambda: tmp_path)


BENCH = ["bench", "--device", "cpu", "--shapes", "64x128,100x60", "--tokens", "1,5", "--seconds", "0.01"]


@pytest.mark.usefixtures("_small")
def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    """All products by bfloat16 and by engines, with times and errors; engines that reject a product say why."""
    assert main([*BENCH, "--engines", "auto,cpu,reference,triton", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["device"] == "cpu"
    assert facts["versions"]["torch"] == torch.__version__
    rows = {(row["n"], row["k"], row["m"], row["name"]): row for row in facts["rows"]}
    shapes = [(64, 128), (100, 60)]
    winner = next(row["name"] for row in facts["rows"] if row["auto"])
    names = {"bf16", "cpu", "reference", "triton", winner}
    assert set(rows) == {(n, k, m, name) for n, k in shapes for m in (1, 5) for name in names}
    for (*_, name), row in rows.items():
        if name == "triton":
            assert "runs on cuda only, found cpu" in row["note"]
            assert row["microseconds"] is row["x_bf16"] is row["error"] is None
        else:
            assert row["note"] == ""
            assert row["microseconds"] > 0
            assert row["error"] < 8e-3
        if name == "bf16":
            assert row["x_bf16"] == 1
    assert main([*BENCH, "--scheme", "block"]) == 0
    text = capsys.readouterr().out
    assert "weight 128x128, activation 1x128, bfloat16" in text
    assert "100 x 60      5  cpu" in text


@pytest.mark.usefixtures("_small")
def test_bench_reports_a_wrong_engine_and_does_not_time_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = CpuEngine.linear
    monkeypatch.setattr(CpuEngine, "linear", lambda *arguments: right(*arguments) * 1.02)
    assert main([*BENCH, "--engines", "cpu,reference", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    wrong = [row for row in rows if row["name"] == "cpu"]
    assert all(row["note"].startswith("wrong by 2.0e-02") and row["microseconds"] is None for row in wrong)
    assert all(row["microseconds"] for row in rows if row["name"] != "cpu")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--engines", "cpu,warp"], "engines must be auto or from "),
        (["--kinds", "row", "--overwrite"], "--kinds, --overwrite cannot be used without --tune"),
        (["--tune", "--scheme", "row"], "--scheme cannot be used with --tune"),
        (["--tokens", "0"], "tokens must be at least 1, found 0"),
        (["--device", "cuda:77"], "cuda:77 does not exist"),
        (["--engines", "triton"], ""),  # the table says why, and only bfloat16 was timed
    ],
)
@pytest.mark.usefixtures("_small")
def test_bench_cannot(more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, *more]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model", "m", "--tune"], "argument --model: not allowed with argument --shapes"),
        (["--tokens", "few"], "argument --tokens: invalid list of int value: 'few'"),
        (["--shapes", "64"], "argument --shapes: invalid list of shape value: '64'"),
        (["--device", "abacus"], "'abacus' is not a torch device"),
    ],
)
def test_wrong_arguments_of_bench(more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*BENCH, *more])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_tune_without_a_card_ends_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "--tune"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fp8gemm bench: the triton engine cannot be tuned on cpu: runs on cuda only, found cpu")
    assert main([*BENCH, "--tune", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["kind"] == "UnsupportedError"


class OnCard(TritonEngine):
    """Computes products with the reference engine, as if on an H200; library products return zeros."""

    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        return []

    def place(self, device: torch.device) -> Place:
        return place((9, 0), card="NVIDIA H200")

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        met = replace(weight, scheme=self.rounds(x.shape[0], weight, x.dtype))
        y = ReferenceEngine().linear(x, met, bias, out_dtype)
        return y * 0 if self.plan(x.shape[0], weight, x.dtype).path == "library" else y


@pytest.mark.usefixtures("_small")
def test_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """First by shapes, then by a checkpoint; the table keeps the rows of both."""
    monkeypatch.setattr(plans, "TritonEngine", OnCard)
    command = ["bench", "--tune", "--device", "cpu", "--seconds", "0.01"]
    assert main([*command, "--shapes", "64x128,64x100", "--tokens", "3,4,20", "--kinds", "row"]) == 0
    text = capsys.readouterr().out
    assert "cpu NVIDIA H200" in text
    assert "row           64 x 128     32" in text
    assert "    dropped: library: wrong by 1.0e+00" in text
    assert "left out: row 64 x 100: N and K must be multiples of 16" in text
    table = tmp_path / tables.USER_FILE
    assert f"wrote {table}" in text
    folder = write(tmp_path / "in", {"m.weight": fp8(128, 128), "m.weight_scale_inv": scales(1, 1)}, BLOCKS)
    assert main([*command, "--model", str(folder), "--tokens", "16", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["kind"], row["n"], row["k"], row["m"]) == ("block", 128, 128, 16)
    assert {key[1:] for key in tables.read_table(table)[1]} == {
        ("row", 64, 128, 4),
        ("row", 64, 128, 32),
        ("block", 128, 128, 16),
    }
