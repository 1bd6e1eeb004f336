"""Known problems of combinations of card, system and library versions, each with its public source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..engines import Machine

Versions = Mapping[str, str | None]  # of distributions; None where one is not installed


@dataclass(frozen=True, kw_only=True)
class KnownProblem:
    """A combination, what happens with it, what works instead, and where that was reported.

    ``applies`` tells whether a machine with these versions is such a combination.
    """

    combination: str
    happens: str
    works: str
    source: str
    applies: Callable[[Machine, Versions], bool] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("combination", "happens", "works", "source")}

    def __str__(self) -> str:
        return f"{self.combination}: {self.happens}. Works: {self.works} ({self.source})"


def known_problems(machine: Machine, versions: Versions) -> tuple[KnownProblem, ...]:
    """Those of the table that apply to a machine.

    Example:
        >>> ada = Machine(device="cuda", capability=(8, 9), torch_version=(2, 11), cuda_version=(13, 0))
        >>> [problem.combination for problem in known_problems(ada, {})][0]
        'torch before 2.12 on compute capability 8.9'
    """
    return tuple(problem for problem in KNOWN if problem.applies(machine, versions))


def _cuda(*capabilities: int | tuple[int, int]) -> Callable[[Machine], bool]:
    """Whether a machine's compute capability is one of these, or has one of these major numbers."""

    def matches(machine: Machine) -> bool:
        found = machine.capability
        return machine.device == "cuda" and found is not None and (found in capabilities or found[0] in capabilities)

    return matches


def _before(version: tuple[int, int] | None, limit: tuple[int, int]) -> bool:
    return version is not None and version < limit


KNOWN = (
    KnownProblem(
        combination="torch before 2.12 on compute capability 8.9",
        happens="torch's row-wise FP8 product ignores the current CUDA stream, and from 256 tokens on it may stall the "
        "GPU when it is called on a side stream",
        works="torch 2.12, the default stream, or tensor-wise scales",
        source="https://github.com/FlashML-org/FreeToken/pull/243",
        applies=lambda machine, versions: _cuda((8, 9))(machine) and _before(machine.torch_version, (2, 12)),
    ),
    KnownProblem(
        combination="torch 2.10 with CUDA 13.0 on compute capability 12.0",
        happens="torch._scaled_mm with row scales raises CUBLAS_STATUS_NOT_SUPPORTED",
        works="tensor-wise scales, by which the torch engine then multiplies, applying the row scales afterwards",
        source="https://github.com/pytorch/pytorch/issues/192707",
        applies=lambda machine, versions: (
            _cuda((12, 0))(machine) and machine.torch_version == (2, 10) and machine.cuda_version == (13, 0)
        ),
    ),
    KnownProblem(
        combination="torch on Windows",
        happens="torch's row-wise FP8 product is not built, and raises 'Rowwise scaling is not currently supported on "
        "your device'",
        works="tensor-wise scales, by which the torch engine then multiplies, applying the row scales afterwards",
        source="https://github.com/pytorch/pytorch/pull/194606",
        applies=lambda machine, versions: machine.device == "cuda" and machine.system == "win32",
    ),
    KnownProblem(
        combination="torch before 2.14 with row scales by CUTLASS: compute capability 8.9, 10.x and 12.x, or CUDA "
        "before 12.9",
        happens="without a bias, the kernel of torch._scaled_mm writes bfloat16, even where float16 is asked for",
        works="bfloat16 output, which the torch engine asks for and casts",
        source="https://github.com/pytorch/pytorch/pull/187569",
        applies=lambda machine, versions: (
            _before(machine.torch_version, (2, 14))
            and (_cuda((8, 9), 10, 12)(machine) or (_cuda((9, 0))(machine) and _before(machine.cuda_version, (12, 9))))
        ),
    ),
    KnownProblem(
        combination="torch on compute capability 10.3",
        happens="torch._scaled_grouped_mm with row scales traps, and the process can use the GPU no more",
        works="the torch engine refuses experts there; the triton engine's own kernels multiply them",
        source="https://github.com/pytorch/pytorch/issues/187095",
        applies=lambda machine, versions: _cuda((10, 3))(machine),
    ),
    KnownProblem(
        combination="cuBLASLt's 128x128 block scales",
        happens="they exist for compute capability 9.0 only, from CUDA 12.9 on",
        works="the triton engine multiplies blocks elsewhere",
        source="https://github.com/NVIDIA/CUDALibrarySamples/issues/310",
        applies=lambda machine, versions: (
            _cuda((8, 9), 10, 11, 12)(machine) or (_cuda((9, 0))(machine) and _before(machine.cuda_version, (12, 9)))
        ),
    ),
    KnownProblem(
        combination="cuBLASLt's 128x128 block scales on compute capability 9.0",
        happens="the number of tokens must be a multiple of 4",
        works="the engines pad the tokens",
        source="https://github.com/vllm-project/vllm/pull/49932",
        applies=lambda machine, versions: _cuda((9, 0))(machine) and not _before(machine.cuda_version, (12, 9)),
    ),
    KnownProblem(
        combination="Triton below compute capability 8.9",
        happens="kernels with e4m3 values do not compile: 'type fp8e4nv not supported in this architecture'",
        works="the triton engine decodes the codes as integers there, with activations as they are",
        source="https://github.com/triton-lang/triton/issues/4319",
        applies=lambda machine, versions: _cuda((8, 0), (8, 6), (8, 7))(machine),
    ),
    KnownProblem(
        combination="DeepGEMM on compute capability 10.x with float32 scales",
        happens="its kernel reads power-of-two scales only; a caller that rounds others up to them gets finite, wrong "
        "results",
        works="the deep_gemm engine takes schemes with scale_format='ue8m0' only there",
        source="https://github.com/huggingface/transformers/issues/47030",
        applies=lambda machine, versions: _cuda(10)(machine),
    ),
    KnownProblem(
        combination="vLLM's CUTLASS block scales on compute capability 9.0",
        happens="slower than bfloat16 for a 2112x7168 weight on an H100, from 1 to 8192 tokens",
        works="auto takes the triton engine first",
        source="https://github.com/vllm-project/vllm/pull/23280",
        applies=lambda machine, versions: _cuda((9, 0))(machine) and bool(versions.get("vllm")),
    ),
    KnownProblem(
        combination="vLLM's CUTLASS block scales on compute capability 8.9",
        happens="vLLM reports them as unsupported below 9.0",
        works="row and tensor scales; the triton engine multiplies blocks",
        source="https://github.com/vllm-project/vllm/issues/58241",
        applies=lambda machine, versions: _cuda((8, 9))(machine) and bool(versions.get("vllm")),
    ),
    KnownProblem(
        combination="vLLM on compute capability 12.1 (GB10)",
        happens="builds with kernels for 12.1 may trap: 'This kernel only supports sm120'",
        works="the triton engine, which auto takes first",
        source="https://github.com/eugr/spark-vllm-docker/issues/143",
        applies=lambda machine, versions: _cuda((12, 1))(machine) and bool(versions.get("vllm")),
    ),
    KnownProblem(
        combination="torch for ROCm on Windows with gfx1200",
        happens="torch.nn.functional.scaled_mm ends the process with an access violation",
        works="torch._scaled_mm, which the torch engine calls for tensor scales",
        source="https://github.com/ROCm/TheRock/issues/4079",
        applies=lambda machine, versions: (
            machine.device == "rocm" and machine.system == "win32" and "gfx1200" in machine.features
        ),
    ),
    KnownProblem(
        combination="ROCm on gfx942 (MI300)",
        happens="hipBLASLt multiplies e4m3fnuz there and not e4m3fn",
        works="the torch engine reinterprets the codes and doubles the scales, exactly but for the sign of zeros",
        source="https://github.com/ROCm/legacy-rocm-build/issues/6019",
        applies=lambda machine, versions: machine.device == "rocm" and "gfx942" in machine.features,
    ),
    KnownProblem(
        combination="torch._scaled_mm on a CPU",
        happens="torch emulates it where oneDNN cannot run FP8 products",
        works="engine='cpu', which auto takes",
        source="https://github.com/pytorch/pytorch/pull/139975",
        applies=lambda machine, versions: machine.device == "cpu",
    ),
)
