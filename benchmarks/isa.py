"""Instruction sets of x86 processors, and the environments in which all libraries are held down to one of them.

python benchmarks/isa.py                    prints those that this processor has, best first
python benchmarks/isa.py avx2 COMMAND ...   runs a command held down to one
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fp8gemm import native


@dataclass(frozen=True, kw_only=True)
class Level:
    """An instruction set: torch's question whether the processor has it, and the variables that hold down to it."""

    question: str
    variables: Mapping[str, str] = field(default_factory=dict)


def _variables(ours: str, torch: str, onednn: str, mkl: str, fbgemm: str) -> dict[str, str]:
    """MKL ignores its variable on processors that are not Intel's; FBGEMM multiplies torch's int8."""
    return {
        "FP8GEMM_ISA": ours,
        "ATEN_CPU_CAPABILITY": torch,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "FBGEMM_ENABLE_INSTRUCTIONS": fbgemm,
    }


# Best first. The best that there is needs nothing to hold it down.
LEVELS: dict[str, Level] = {
    "amx": Level(question="_is_amx_tile_supported"),
    "avx512_bf16": Level(
        question="_is_avx512_bf16_supported",
        variables=_variables("avx512_bf16", "avx512", "AVX512_CORE_BF16", "AVX512_E1", "AVX512_E1"),
    ),
    "avx512": Level(
        question="_is_avx512_supported",
        variables=_variables("avx512", "avx512", "AVX512_CORE", "AVX512", "AVX512"),
    ),
    "avx2": Level(
        question="_is_avx2_supported",
        variables=_variables("avx2", "avx2", "AVX2", "AVX2", "AVX2"),
    ),
}
VARIABLES = tuple(LEVELS["avx2"].variables)


def available() -> list[str]:
    """The levels that this processor has, best first, whatever the environment says."""
    # torch's questions are private; a missing one counts as no.
    return [name for name, level in LEVELS.items() if getattr(torch.cpu, level.question, lambda: False)()]


def held_down(level: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment with all libraries held down to ``level``; variables that it set itself are replaced."""
    rest = {name: value for name, value in environment.items() if name not in VARIABLES}
    return rest | dict(LEVELS[level].variables)


def in_effect() -> str:
    """The level that fp8gemm's kernels use in this process; without kernels, that to which it is held down, else the
    best that the processor has."""
    library = native.loaded()
    if library is not None:
        return library.instructions
    return os.environ.get("FP8GEMM_ISA") or (available() or ["portable"])[0]


def limits() -> dict[str, str]:
    """Those of the variables that are set in this process."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def main(arguments: list[str]) -> None:
    if not arguments:
        print(*available(), sep="\n")
        return
    level, *command = arguments
    if level not in available() or not command:
        levels = ", ".join(available()) or "no levels"
        raise SystemExit(f"wanted one of {levels} and a command, found {' '.join(arguments)}")
    os.execvpe(command[0], command, held_down(level))


if __name__ == "__main__":
    main(sys.argv[1:])
