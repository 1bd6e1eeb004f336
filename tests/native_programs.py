"""The compiled kernels as a program that checks itself: for sanitizers and for emulators."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fp8gemm.native.compiler import FLAGS, FLOAT_FLAGS

# Levels of x86 processors, as the driver numbers them; those whose instructions functions can stand for.
LEVELS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
EMULATED = LEVELS[2:]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or ""
DRIVER = Path(__file__).parent / "sanitize/native_driver.cpp"
# Instead of torch's OpenMP runtime, which a process would have, a program links the system's.
OPENMP = ("-fopenmp", "-Wl,--no-as-needed", "-lgomp")


def compiled(compiler: Sequence[str], source: Path, program: Path, *further: str) -> Path:
    """``program``, compiled from ``source`` as the library is, with further flags."""
    flags = [flag for flag in FLAGS + FLOAT_FLAGS if flag not in ("-shared", "-fPIC")]
    subprocess.run([*compiler, *flags, *further, str(source), "-o", str(program)], check=True, timeout=600)
    return program


def emulating(source: Path, program: Path, *further: str) -> Path:
    """``program``, whose AVX-512 and AMX instructions are functions; any x86 processor with AVX2 executes it."""
    flags = ["-O1", "-mavx2", "-mfma", "-mf16c", "-I", str(Path(__file__).parent / "x86/emulated")]
    flags += ["-DKEEP(vector)=", "-DBEGIN_TARGET(features)=", "-DEND_TARGET="]
    flags += ["-ffp-contract=off", *OPENMP]  # compiled otherwise, a sum is rounded as the compiler likes
    return compiled([COMPILER], source, program, *flags, *further)


def altered(folder: Path, changes: dict[str, tuple[str, str]]) -> Path:
    """The driver in ``folder``, beside kernels in whose headers, by name, all of one text is replaced by another."""
    kernels = folder / "fp8gemm/native"
    shutil.copytree(DRIVER.parents[2] / "fp8gemm/native", kernels)
    for header, (old, new) in changes.items():
        text = (kernels / header).read_text()
        assert old in text
        (kernels / header).write_text(text.replace(old, new))
    driver = folder / "tests/sanitize" / DRIVER.name
    driver.parent.mkdir(parents=True)
    shutil.copy(DRIVER, driver)
    return driver


def run(program: Path, *arguments: int) -> subprocess.CompletedProcess[str]:
    """The driver with numbers as arguments. Its workspace is never freed, which is no leak."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
