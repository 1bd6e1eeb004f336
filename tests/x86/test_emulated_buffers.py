"""AVX-512 and AMX under the address sanitizer, by emulated instructions: `pytest tests/x86`."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_programs import DRIVER, EMULATED, LEVELS, emulating, run

SANITIZERS = ("-O0", "-fsanitize=address")  # optimized, it takes ten minutes to compile


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    return emulating(DRIVER, tmp_path_factory.mktemp("x86") / "driver", *SANITIZERS)


@pytest.mark.parametrize("level", EMULATED)
def test_no_byte_beyond_a_buffer_is_touched(driver, level):
    result = run(driver, LEVELS.index(level))
    assert result.returncode == 0, result.stdout + result.stderr
