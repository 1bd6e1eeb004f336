"""AVX-512 and AMX on a CPU that may have neither: `bash .ci/run kernels`, or `pytest tests/x86`.

The intrinsics are functions of SIMDe (Debian's `libsimde-dev`) and of `emulated/immintrin.h`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from native_programs import COMPILER, DRIVER, EMULATED, LEVELS, OPENMP, altered, compiled, emulating, run

BF16, FP32 = 0, 2


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    return emulating(DRIVER, tmp_path_factory.mktemp("x86") / "driver")


@pytest.mark.parametrize("level", EMULATED)
def test_results_are_those_of_sums_in_double(driver, level):
    result = run(driver, LEVELS.index(level))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    return compiled([COMPILER], DRIVER, tmp_path_factory.mktemp("x86") / "driver", "-O1", "-ffp-contract=off", *OPENMP)


@pytest.mark.parametrize("level", EMULATED)
def test_results_are_those_of_a_cpu_that_has_the_instructions(driver, real, level):
    found = run(real, LEVELS.index(level))
    if found.returncode == 2:
        pytest.skip(f"this CPU has no {level}")
    assert (found.returncode, found.stdout) == (0, run(driver, LEVELS.index(level)).stdout)


def test_a_level_that_is_missing_is_no_success(driver):
    assert run(driver, len(LEVELS)).returncode == 2


@pytest.mark.parametrize(("level", "dtype"), [("avx512", FP32), ("avx512_bf16", BF16), ("amx", BF16)])
def test_each_level_runs_its_own_kernels(driver, level, dtype):
    result = run(driver, LEVELS.index(level), dtype, 20, 64, 128, 1)
    assert result.stdout == f"{level}\n", result.stderr


def test_nothing_but_avx2_is_executed(driver):
    code = subprocess.run(["objdump", "-d", str(driver)], capture_output=True, text=True, check=True).stdout
    assert "%ymm" in code
    assert "%zmm" not in code
    assert "tdpbf16ps" not in code


def test_codes_that_are_decoded_wrongly_would_be_noticed(tmp_path):
    """With AVX-512 the last bit of each mantissa is lost, with bf16 instructions the sign."""
    changes = {"avx512.h": ("0xBF80", "0xBF00"), "avx512_bf16.h": ("char(0x80)", "char(0x00)")}
    broken = emulating(altered(tmp_path, changes), tmp_path / "driver")
    for level in EMULATED:
        result = run(broken, LEVELS.index(level), 3)  # the first three shapes
        assert result.returncode == 1
        assert f"{level}, type 0: 37 x 17 x 33 is wrong" in result.stdout
