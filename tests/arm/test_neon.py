"""The compiled kernels on an emulated 64-bit ARM CPU of the oldest kind: `bash .ci/run kernels`, or `pytest tests/arm`.

They are compiled by Debian's `g++-aarch64-linux-gnu`, and by `clang++` too if there is one with `lld`; `qemu-user` runs
them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from native_programs import DRIVER, altered, compiled

LIBRARIES = "/usr/aarch64-linux-gnu"
LEVELS = ["portable", "neon"]
BF16, FP16, FP32 = 0, 1, 2
# The driver is a program: instead of torch's OpenMP runtime, which a process would have, it links the system's.
PROGRAM = ("-Wl,--no-as-needed", f"-L{LIBRARIES}/lib", "-l:libgomp.so.1")
COMPILERS = {"g++": ("aarch64-linux-gnu-g++",), "clang++": ("clang++", "--target=aarch64-linux-gnu", "-fuse-ld=lld")}
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FOUND = [name for name in COMPILERS if name == "g++" or (shutil.which(name) and shutil.which("ld.lld"))]


@pytest.fixture(scope="module", params=FOUND)
def compiler(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return COMPILERS[request.param]


@pytest.fixture(scope="module")
def driver(compiler, tmp_path_factory) -> Path:
    return compiled(compiler, DRIVER, tmp_path_factory.mktemp("arm") / "driver", *PROGRAM)


def emulate(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a program, with options of the emulator before it, on an ARMv8.0 CPU: newer instructions are illegal."""
    environment = {**os.environ, "QEMU_LD_PREFIX": LIBRARIES, "ASAN_OPTIONS": "detect_leaks=0"}
    whole = ["qemu-aarch64", "-cpu", "cortex-a53", *command]
    return subprocess.run(whole, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.parametrize("level", LEVELS)
def test_results_are_those_of_sums_in_double(driver, level):
    result = emulate(str(driver), str(LEVELS.index(level)))
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_byte_beyond_a_buffer_is_touched(tmp_path):
    program = compiled(COMPILERS["g++"], DRIVER, tmp_path / "driver", *SANITIZERS, *PROGRAM)
    result = emulate(str(program), str(LEVELS.index("neon")))
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_code_that_is_decoded_wrongly_would_be_noticed(tmp_path):
    """The last bit of each mantissa is lost."""
    source = altered(tmp_path, {"neon.h": ("0xBF80", "0xBF00")})
    broken = compiled(COMPILERS["g++"], source, tmp_path / "driver", *PROGRAM)
    result = emulate(str(broken), str(LEVELS.index("neon")), "3")  # the first three shapes
    assert result.returncode == 1
    assert "neon, type 0: rows of 17 x 33 are wrong" in result.stdout
    assert "neon, type 0: 37 x 17 x 33 is wrong" in result.stdout


@pytest.fixture(scope="module")
def plugin(driver, tmp_path_factory) -> Path:
    """The plugin that counts instructions, for the version of the interface that this emulator has."""
    folder = tmp_path_factory.mktemp("plugin")
    source = Path(__file__).with_name("count.c")
    for version in range(1, 20):
        library = folder / f"count{version}.so"
        command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", f"-DVERSION={version}", str(source)]
        subprocess.run([*command, "-o", str(library)], check=True, timeout=60)
        result = emulate("-plugin", str(library), str(driver), "0", "0", "1", "1", "1", "0")
        if result.returncode == 0:
            return library
    pytest.fail(f"qemu-aarch64 takes no plugin: {result.stderr}")


def instructions(plugin: Path, driver: Path, level: str, dtype: int, m: int, n: int, k: int) -> int:
    """Executed by one product: what a second one adds to the first."""
    counts = []
    for times in (1, 2):
        numbers = (LEVELS.index(level), dtype, m, n, k, times)
        result = emulate("-plugin", str(plugin), str(driver), *map(str, numbers))
        assert result.stdout == f"{level}\n", result.stderr
        found = re.search(r"^(\d+) instructions$", result.stderr, re.MULTILINE)
        assert found, result.stderr
        counts.append(int(found[1]))
    return counts[1] - counts[0]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_few_instructions_are_executed(driver, plugin, dtype):
    """Per weight and token, at least: 4 to decode 8 weights for any number of tokens, and one to multiply 4."""
    n, k = 512, 2048
    for m, most in ((1, 1.3), (2, 0.75), (4, 0.6), (8, 0.6), (64, 0.4)):
        count = instructions(plugin, driver, "neon", dtype, m, n, k) / (m * n * k)
        assert 1 / 4 + 1 / 2 / m < count <= most, f"M={m}: {count}"


def test_neon_saves_half_of_the_instructions(driver, plugin):
    for m in (1, 64):
        counts = [instructions(plugin, driver, level, BF16, m, 512, 2048) for level in LEVELS]
        assert counts[1] < counts[0] / 2, f"M={m}: {counts}"
