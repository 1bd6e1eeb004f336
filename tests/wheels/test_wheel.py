"""Wheels as users install them, on x86_64 Linux: `pip install auditwheel build && pytest tests/wheels`.

They are built from a copy of the checkout, and run in an environment of their own, where no compiler can be found. It
needs a package index with torch, and a compiler.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from fp8gemm.native.compiler import carried_name, source_digest

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"  # a CPU build; any other version would bring CUDA
NATIVE = "fp8gemm/native"
MANYLINUX, LINUX, ANY = (f"py3-none-{tag}" for tag in ("manylinux2014_x86_64", "linux_x86_64", "any"))
pytestmark = [
    pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="tags of x86_64 Linux"),
    pytest.mark.timeout(1800),  # torch is downloaded
]


def run(*command: object, **change: str) -> subprocess.CompletedProcess[str]:
    """A command that succeeds, and what it printed; it sees neither this checkout nor an earlier cache of kernels."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "FP8GEMM_CACHE"}}
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env={**environment, **change},
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheels")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copied(tmp_path / "checkout")


def copied(target: Path) -> Path:
    """The checkout without what was built in it."""
    unwanted = ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    return copytree(ROOT, target, ignore=unwanted)


def build_wheel(source: Path, target: Path, **change: str) -> tuple[Path, str]:
    """The only wheel that `pip wheel` makes, and what the build prints."""
    done = run(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", target, source, **change)
    (wheel,) = target.glob("*.whl")
    return wheel, done.stderr


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    return build_wheel(copied(folder / "checkout"), folder / "wheel")[0]


@pytest.fixture(scope="module")
def bare(folder: Path) -> tuple[Path, str]:
    """A wheel that was built where there is no compiler, and what was printed."""
    return build_wheel(copied(folder / "bare checkout"), folder / "bare wheel", CXX="nothing")


def tag(wheel: Path) -> str:
    """The tag in a wheel's name, which is also the one inside."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        (inside,) = re.findall("^Tag: (.+)$", archive.read(name).decode(), re.MULTILINE)
    assert wheel.name.endswith(f"-{inside}.whl")
    return inside


def libraries(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if ".so" in name]


def wanted(wheel: Path, folder: Path) -> str:
    """The library that the package in a wheel looks for."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return f"{NATIVE}/{carried_name(source_digest(folder / NATIVE / 'fp8gemm.cpp'))}"


def test_a_wheel_carries_one_library(wheel: Path, tmp_path: Path) -> None:
    assert tag(wheel) == MANYLINUX
    assert libraries(wheel) == [wanted(wheel, tmp_path)]


def test_auditwheel_agrees_with_the_tag(wheel: Path) -> None:
    shown = " ".join(run(sys.executable, "-m", "auditwheel", "show", wheel).stdout.split())
    assert 'is consistent with the following platform tag: "manylinux_2_17_x86_64"' in shown


def test_what_a_newer_system_has_is_named(checkout: Path, tmp_path: Path) -> None:
    """A library that needs a symbol which manylinux2014 does not have is for machines like this one."""
    newer = tmp_path / "newer.h"
    newer.write_text('#include <unistd.h>\nextern "C" int newer(void* p) { return getentropy(p, 8); }\n')
    made, output = build_wheel(checkout, tmp_path / "wheel", CXX=f"c++ -include {newer}")
    assert tag(made) == LINUX
    assert libraries(made) == [wanted(made, tmp_path / "unpacked")]
    assert "not manylinux2014: its library needs getentropy@GLIBC_2.25 of libc.so.6" in output


def test_a_compiler_for_this_cpu_makes_a_wheel_for_all(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    """As of distributions whose compilers assume x86-64-v2 or v3."""
    made, _ = build_wheel(checkout, tmp_path / "wheel", CXX="c++ -march=x86-64-v3")
    assert tag(made) == MANYLINUX
    assert content(made) == content(wheel)


def content(wheel: Path) -> dict[str, bytes]:
    """What a wheel installs, without its list of files."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def test_what_an_earlier_build_left_is_not_packed(checkout: Path, tmp_path: Path) -> None:
    """Another library, a header that has been removed, and the folders of builds that were killed."""
    (checkout / NATIVE / "removed.h").touch()
    first, _ = build_wheel(checkout, tmp_path / "first")
    (checkout / NATIVE / "removed.h").unlink()
    (packed,) = (checkout / "build").glob("lib*")
    assert (packed / NATIVE / "removed.h").is_file()
    for left in (packed / NATIVE, checkout / "build" / "bdist.linux-x86_64" / "wheel" / NATIVE):
        left.mkdir(parents=True, exist_ok=True)
        (left / carried_name("0123456789")).touch()
        (left / "old.py").touch()
    second, _ = build_wheel(checkout, tmp_path / "second")
    assert libraries(second) == [wanted(second, tmp_path / "unpacked")]
    assert libraries(second) != libraries(first)
    assert {"removed.h", "old.py"}.isdisjoint(Path(name).name for name in content(second))
    third, _ = build_wheel(checkout, tmp_path / "third", FP8GEMM_NATIVE="0")
    assert (tag(third), libraries(third)) == (ANY, [])


def test_a_source_distribution_makes_the_same_wheel(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    """`python -m build` makes the wheel from the source distribution."""
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", checkout)
    (made,) = (tmp_path / "dist").glob("*.whl")
    assert tag(made) == MANYLINUX
    assert content(made) == content(wheel)
    (packed,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        assert [name for name in archive.getnames() if name.endswith(".so")] == []


PRODUCT = """
import torch
from fp8gemm import enable_fp8_gemm, report
layer = enable_fp8_gemm(torch.nn.Linear(64, 32))
x = torch.randn(3, 64)
expected = x.double() @ layer.weight.dequantize().double().T + layer.bias.double()
torch.testing.assert_close(layer(x), expected.float())
print(report(layer).rows[0].kernels)
"""


@pytest.fixture(scope="module")
def environment(folder: Path) -> Path:
    """The bin folder of an environment with torch alone."""
    run(sys.executable, "-m", "venv", folder / "environment")
    binaries = folder / "environment" / "bin"
    run(binaries / "pip", "install", "--no-cache-dir", TORCH)
    return binaries


def install(binaries: Path, *what: object) -> subprocess.CompletedProcess[str]:
    """Installs the package with its dependencies, in place of the one that is there."""
    run(binaries / "pip", "uninstall", "--yes", "fp8gemm")
    return run(binaries / "pip", "install", "-v", *what)


def ran(binaries: Path, cache: Path, **change: str) -> tuple[str, str]:
    """Which kernels multiply, and what `fp8gemm doctor` says of them."""
    there = {"FP8GEMM_CACHE": str(cache), **change}
    kernels = run(binaries / "python", "-c", PRODUCT, **there).stdout
    return kernels, json.loads(run(binaries / "fp8gemm", "doctor", "--probe", "none", "--json", **there).stdout)[
        "native"
    ]


NO_COMPILER = {"CXX": "/nowhere/c++", "PATH": "/nowhere"}


def test_an_installed_wheel_runs_the_library_that_it_carries(wheel: Path, environment: Path, tmp_path: Path) -> None:
    install(environment, wheel)
    cache = tmp_path / "cache"
    cache.mkdir()
    kernels, said = ran(environment, cache, **NO_COMPILER)
    assert "native" in kernels
    (library,) = libraries(wheel)
    path, _, origin = said.split(", ")
    assert Path(path).is_relative_to(environment.parent)
    assert path.endswith(f"/site-packages/{library}")
    assert origin == "carried by the installed package"
    assert list(cache.iterdir()) == []


def test_a_wheel_from_where_there_is_no_compiler(bare: tuple[Path, str], environment: Path, tmp_path: Path) -> None:
    """It is for any machine; torch multiplies there, or what is compiled at first use."""
    made, output = bare
    assert tag(made) == ANY
    assert libraries(made) == []
    assert "the wheel carries no compiled library: no C++ compiler: looked for nothing (CXX)" in output
    install(environment, made)
    kernels, said = ran(environment, tmp_path / "cache", **NO_COMPILER)
    assert "torch" in kernels
    assert said.startswith("no C++ compiler: looked for /nowhere/c++ (CXX)")
    assert not (tmp_path / "cache").exists()


def test_an_editable_install_compiles_at_first_use(checkout: Path, environment: Path, tmp_path: Path) -> None:
    """Even where a wheel has been built, whose library is of the source at that time."""
    build_wheel(checkout, tmp_path / "wheel")
    done = install(environment, "--editable", checkout)
    assert f"fp8gemm-0.1.0-0.editable-{ANY}.whl" in done.stdout
    assert "Traceback" not in done.stderr  # setuptools silences errors of commands while it makes this kind of install
    assert list((checkout / "fp8gemm").rglob("*.so")) == []
    kernels, said = ran(environment, tmp_path / "cache")
    assert "native" in kernels
    assert said.startswith(str(tmp_path / "cache"))
    assert ", from the cache, compiled by " in said
