"""The native kernels under the address and undefined-behaviour sanitizers: `pytest tests/sanitize`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fp8gemm.native.compiler import FLAGS, FLOAT_FLAGS

DRIVER = Path(__file__).with_name("native_driver.cpp")
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or ""
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# The driver is a program: instead of torch's OpenMP runtime, which a process would have, it links the system's.
PROGRAM = ("-fopenmp", "-Wl,--no-as-needed", "-lgomp")


def compiled(tmp_path: Path, source: Path) -> Path:
    program = tmp_path / "driver"
    flags = [flag for flag in FLAGS + FLOAT_FLAGS if flag not in ("-shared", "-fPIC", "-O3")]
    subprocess.run([COMPILER, *flags, *SANITIZERS, str(source), "-o", str(program), *PROGRAM], check=True, timeout=600)
    return program


def run(program: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler: install one, or set CXX")
def test_kernels_are_clean_and_exact(tmp_path):
    result = run(compiled(tmp_path, DRIVER))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler: install one, or set CXX")
def test_the_sanitizers_notice_a_byte_too_many(tmp_path):
    source = tmp_path / "broken.cpp"
    text = DRIVER.read_text().replace('"../../fp8gemm', f'"{DRIVER.parents[2]}/fp8gemm')
    broken = text.replace(
        "data(size_t(n * k));\n    std::vector<uint8_t> out",
        "data(size_t(n * k - (n > 1)));\n    std::vector<uint8_t> out",
    )
    assert broken != text
    source.write_text(broken)
    result = run(compiled(tmp_path, source))
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
