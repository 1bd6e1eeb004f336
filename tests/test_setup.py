"""How a wheel is tagged, and when it carries a compiled library; ``tests/wheels`` builds real ones."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fp8gemm.native.compiler import Compiler, carried_name, source_digest

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """``setup.py`` as a module, which builds nothing."""
    spec = importlib.util.spec_from_file_location("fp8gemm_setup", SETUP)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("need", "newer"),
    [
        (("libc.so.6", "memcpy", "GLIBC_2.14"), False),
        (("libm.so.6", "exp", "GLIBC_2.17"), False),
        (("libm.so.6", "exp", "GLIBC_2.29"), True),
        (("libc.so.6", "memcpy", "GLIBC_2.2.5"), False),
        (("libc.so.6", "x", "GLIBC_2.17.1"), True),
        (("libc.so.6", "", "GLIBC_ABI_DT_RELR"), True),
        (("libc.so.6", "x", "GLIBC_PRIVATE"), True),
        (("libstdc++.so.6", "__cxa_thread_atexit", "CXXABI_1.3.7"), False),
        (("libstdc++.so.6", "__cxa_init_primary_exception", "CXXABI_1.3.11"), True),
        (("libstdc++.so.6", "f", "GLIBCXX_3.4.19"), False),
        (("libstdc++.so.6", "f", "GLIBCXX_3.4.20"), True),
        (("libgcc_s.so.1", "_Unwind_Resume", "GCC_3.0"), False),
        (("libgcc_s.so.1", "__cpu_model", "GCC_4.8.0"), False),
        (("libgcc_s.so.1", "f", "GCC_7.0.0"), True),
        (("libc.so.6",), False),
        (("libgomp.so.1",), True),
        (("libgomp.so.1", "GOMP_parallel", "GOMP_4.0"), True),
        (("libc.musl-x86_64.so.1",), True),
    ],
)
def test_what_manylinux2014_has(setup: ModuleType, need: tuple[str, ...], newer: bool) -> None:
    assert setup.Need(*need).too_new() is newer


def test_tags(setup: ModuleType) -> None:
    """Manylinux2014 if the library can run there; otherwise setuptools' own, with all that is too new by its name."""
    old = setup.Need("libc.so.6", "memcpy", "GLIBC_2.14")
    new = setup.Need("libc.so.6", "getentropy", "GLIBC_2.25"), setup.Need("libgomp.so.1")
    assert setup.platform_tag("linux_x86_64", "x86_64", [old]) == ("manylinux2014_x86_64", [])
    assert setup.platform_tag("linux_x86_64", "x86_64", [old, *new]) == (
        "linux_x86_64",
        ["getentropy@GLIBC_2.25 of libc.so.6", "libgomp.so.1"],
    )
    for default, machine, tag in (
        ("linux_aarch64", "aarch64", "linux_aarch64"),
        ("macosx_11_0_arm64", "arm64", "macosx_11_0_arm64"),
        ("macosx_10_13_universal2", "x86_64", "macosx_10_13_x86_64"),
    ):
        assert setup.platform_tag(default, machine, [old]) == (tag, [])


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Sets $CXX to a compiler that writes its arguments to a file, which is returned, and runs a command on that of
    -o."""

    def behaving(action: str) -> Path:
        script, recorded = tmp_path / "compiler", tmp_path / "recorded"
        script.write_text(f"""#!/bin/sh
[ "$1" = --version ] && echo mock 1.0 && exit
echo "$@" > {recorded}
while [ "$1" != -o ]; do shift; done
{action} "$2"
""")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return recorded

    return behaving


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "native" / "fp8gemm.cpp"
    path.parent.mkdir()
    path.touch()
    return path


def test_each_reason_to_carry_no_library(
    setup: ModuleType, source: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for action, reason in (
        ("echo no tiles >&2; false", "failed with status 1: no tiles"),
        ("true", "succeeded and wrote nothing"),
        ("touch", "mock 1.0 made a library that cannot be loaded"),
    ):
        compiler(action)
        assert reason in setup.compile_carried(source)
        assert list(source.parent.iterdir()) == [source]
    monkeypatch.setenv("CXX", "nothing")
    assert "no C++ compiler: looked for nothing (CXX)" in setup.compile_carried(source)
    monkeypatch.setenv("FP8GEMM_NATIVE", "0")
    assert "FP8GEMM_NATIVE=0 turns" in setup.compile_carried(source)


def test_a_wheel_is_compiled_like_a_cache(
    setup: ModuleType, source: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same flags, and to the name that ``build`` looks for."""
    monkeypatch.setattr(setup, "ctypes", SimpleNamespace(CDLL=str))  # what this compiler makes cannot be loaded
    recorded = compiler("touch")
    library = setup.compile_carried(source)
    assert library == source.with_name(carried_name(source_digest(source)))
    assert library.is_file()
    arguments = recorded.read_text().split()
    flags = list(Compiler((), "").flags)
    assert arguments[: len(flags)] == flags
    assert ("-march=x86-64" in arguments) is (platform.machine() == "x86_64")


def test_the_compiler_is_found_without_any_package(setup: ModuleType) -> None:
    """Where a wheel is built, there is neither torch nor tqdm."""
    code = f"import runpy; print(runpy.run_path({str(setup.COMPILER)!r})['carried_name']('0'))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == carried_name("0"), done.stderr
