"""The native kernels under the address and undefined-behaviour sanitizers: `pytest tests/sanitize`."""

from __future__ import annotations

import pytest
from native_programs import COMPILER, DRIVER, OPENMP, compiled, run

SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler: install one, or set CXX")
def test_kernels_are_clean_and_exact(tmp_path):
    result = run(compiled([COMPILER], DRIVER, tmp_path / "driver", *SANITIZERS, *OPENMP))
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
    # Not optimized, which takes a third of the time to compile.
    result = run(compiled([COMPILER], source, tmp_path / "driver", *SANITIZERS, "-O0", *OPENMP))
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
