"""Building and caching the CPU kernels: any cache, home and compiler leads to a library or to a reason."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path, PurePath

import pytest
from test_native import CHILD, run_in_process

from fp8gemm import native
from fp8gemm.native.build import SOURCE, Built, build, cache_directory
from fp8gemm.native.compiler import COMPILE_SECONDS, Compiler, carried_name, source_digest

FOUND = native.find()
compiled = pytest.mark.skipif(
    isinstance(FOUND, native.Unavailable), reason=getattr(FOUND, "reason", "the native library was found")
)


def library_of(environment: dict[str, str]) -> Path:
    """The path of the library that `build` finds or makes."""
    built = build(environment)
    assert isinstance(built, Built), built
    return built.path


@compiled
def test_several_processes_compile_at_once(tmp_path):
    cache = tmp_path / "cache"
    own = {"FP8GEMM_CACHE": str(cache), "CXX": copying_compiler(tmp_path, seconds=5)}
    environment = {**os.environ, **own, "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [
        subprocess.Popen([sys.executable, "-c", CHILD + "assert multiply()"], env=environment) for _ in range(3)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    assert [path.suffix for path in cache.iterdir()] == [".so"]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_cache_that_others_may_write_is_refused(tmp_path):
    for mode in (0o770, 0o707):
        tmp_path.chmod(mode)
        refused = build({**os.environ, "FP8GEMM_CACHE": str(tmp_path)})
        assert isinstance(refused, native.Unavailable)
        assert "may be written by others" in refused.reason
        assert "run chmod go-w on it" in refused.reason
    tmp_path.chmod(0o700)


def test_a_cache_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    refused = build({**os.environ, "FP8GEMM_CACHE": str(tmp_path)})
    assert isinstance(refused, native.Unavailable)
    assert "belongs to user" in refused.reason


def test_a_library_that_others_may_write_is_refused(tmp_path):
    environment = {**os.environ, "FP8GEMM_CACHE": str(tmp_path / "cache"), "CXX": fake_compiler(tmp_path, "touch")}
    library = library_of(environment)
    assert library_of(environment) == library
    library.chmod(0o722)
    refused = build(environment)
    assert isinstance(refused, native.Unavailable)
    assert "may be written by others" in refused.reason


def fake_compiler(directory: Path, action: str) -> str:
    """A compiler that reports a version, and otherwise runs `action` on the argument of -o."""
    directory.mkdir(exist_ok=True)
    script = directory / "compiler"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit 0\nwhile [ "$1" != -o ]; do shift; done\n{action} "$2"\n'
    )
    script.chmod(0o755)
    return str(script)


def copying_compiler(directory: Path, seconds: int = 0) -> str:
    """A compiler that takes so long for the library that was found; the real one takes more than ten seconds."""
    assert isinstance(FOUND, native.Library)
    return fake_compiler(directory, f"sleep {seconds}; cp {FOUND.path}")


def test_clang_16_goes_without_the_optimization_that_crashes_it():
    plain = Compiler(("c++",), "g++ (Debian 12.2.0-14+deb12u1) 12.2.0").flags
    assert Compiler(("clang++",), "Debian clang version 15.0.6").flags == plain
    without = Compiler(("clang++",), "Debian clang version 16.0.6 (15~deb12u1)\nTarget: x86_64-pc-linux-gnu").flags
    assert without == (*plain, "-mllvm", "-disable-vector-combine")


def test_each_reason_to_go_without(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file"
    file.touch()
    broken = fake_compiler(tmp_path, "echo no such thing as a tile >&2; false")
    cases = {
        "FP8GEMM_NATIVE=0 turns": {"FP8GEMM_NATIVE": "0"},
        "no C++ compiler: looked for nothing (CXX)": {"CXX": "nothing"},
        "no C++ compiler: looked for c++, g++, clang++ (PATH)": {"CXX": "", "PATH": str(empty)},
        "status 1: no such thing as a tile": {"CXX": broken},
        "cannot be used": {"FP8GEMM_CACHE": str(file / "below")},
    }
    for reason, change in cases.items():
        refused = build({**os.environ, "FP8GEMM_CACHE": str(tmp_path / "cache"), **change})
        assert isinstance(refused, native.Unavailable)
        assert reason in refused.reason


def test_a_process_without_a_compiler_still_imports(tmp_path):
    code = "from fp8gemm import native; print(native.find().reason)"
    result = run_in_process(code, CXX="nothing", FP8GEMM_CACHE=str(tmp_path))
    assert "no C++ compiler" in result.stdout, result.stderr
    result = run_in_process(code, FP8GEMM_ISA="sse2")
    assert "FP8GEMM_ISA must be one of portable, " in result.stdout, result.stderr
    if isinstance(FOUND, native.Library):
        result = run_in_process("from fp8gemm import native; print(native.find().instructions)", FP8GEMM_ISA="portable")
        assert result.stdout.strip() == "portable", result.stderr


def test_where_the_cache_is():
    assert cache_directory({"FP8GEMM_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_directory({"XDG_CACHE_HOME": "/b"}) == Path("/b/fp8gemm")
    assert cache_directory({}) == Path.home() / ".cache" / "fp8gemm"
    assert cache_directory({"FP8GEMM_CACHE": "~/a"}) == Path.home() / "a"
    assert cache_directory({"XDG_CACHE_HOME": "~/b"}) == Path.home() / "b" / "fp8gemm"


PATCH = """
import torch
from fp8gemm import doctor, enable_fp8_gemm, native
model = enable_fp8_gemm(torch.nn.Linear(64, 32))
assert model(torch.randn(3, 64)).shape == (3, 32)
print(type(native.find()).__name__, doctor.examine().native, flush=True)
"""


def patched(tmp_path: Path, **environment: str | None) -> str:
    """The output of `doctor` on the kernels, from a process of its own that patches and runs a model."""
    own = {"PYTHONPATH": str(Path(__file__).parents[2]), "FP8GEMM_CACHE": str(tmp_path / "cache")}
    env = {**os.environ, **own, **environment}
    done = subprocess.run(
        [sys.executable, "-c", PATCH],
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in env.items() if value is not None},
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


def test_odd_caches_leave_torch_and_a_reason(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    assert "is not a directory" in patched(tmp_path, FP8GEMM_CACHE=str(file))
    assert "cannot be used" in patched(tmp_path, FP8GEMM_CACHE="/proc/fp8gemm")
    assert "home" in patched(tmp_path, FP8GEMM_CACHE="~nobody-has-this-name/cache")
    for cache in ("\0", "a" * 300, str(tmp_path / "\udcff")):
        found = build({**os.environ, "FP8GEMM_CACHE": cache, "CXX": fake_compiler(tmp_path, "false")})
        assert isinstance(found, native.Unavailable), cache

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    environment = {name: value for name, value in os.environ.items() if name not in ("FP8GEMM_CACHE", "XDG_CACHE_HOME")}
    found = build(environment)
    assert isinstance(found, native.Unavailable)
    assert "home directory" in found.reason
    assert "set FP8GEMM_CACHE" in found.reason


def test_a_cache_that_cannot_be_written_to(tmp_path, monkeypatch):
    """Root cannot revoke its own permission to write, so the call is made to fail instead."""
    real = Path.mkdir

    def refusing(path: Path, *args, **kwargs):
        if path.name.endswith(".part"):
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refusing)
    found = build({**os.environ, "FP8GEMM_CACHE": str(tmp_path), "CXX": fake_compiler(tmp_path, "touch")})
    assert isinstance(found, native.Unavailable)
    assert "Permission denied" in found.reason
    assert "set FP8GEMM_CACHE" in found.reason


def test_odd_compilers_leave_torch_and_a_reason(tmp_path):
    latin = fake_compiler(tmp_path, r"printf 'caf\351' >&2; false")
    for compiler, reason in (
        ('"unbalanced', "is not a working compiler"),
        (str(tmp_path), "no C++ compiler"),
        ("\0", "CXX"),
        (latin, "status 1: caf\ufffd"),
        (fake_compiler(tmp_path / "silent", "true"), "succeeded and wrote nothing"),
    ):
        found = build({**os.environ, "FP8GEMM_CACHE": str(tmp_path / "cache"), "CXX": compiler})
        assert isinstance(found, native.Unavailable), compiler
        assert reason in found.reason
    assert list((tmp_path / "cache").iterdir()) == []
    assert "cannot be loaded" in patched(tmp_path, CXX=fake_compiler(tmp_path / "empty", "touch"))
    assert "is not a working compiler" in patched(tmp_path, CXX='"unbalanced')


@compiled
@pytest.mark.parametrize("damage", ["truncated", "zeroed", "empty", "one bit"])
def test_a_damaged_library_is_built_again(damage, tmp_path):
    quick = copying_compiler(tmp_path)
    assert patched(tmp_path, CXX=quick).startswith("Library")
    (library,) = (tmp_path / "cache").iterdir()
    whole = library.read_bytes()
    flipped = bytes([whole[5000] ^ 1])
    library.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "zeroed": bytes(len(whole)),
            "empty": b"",
            "one bit": whole[:5000] + flipped + whole[5001:],
        }[damage]
    )
    assert patched(tmp_path, CXX=quick).startswith("Library")
    (again,) = (tmp_path / "cache").iterdir()
    assert again.read_bytes() == whole


def test_a_changed_header_is_another_library(tmp_path, monkeypatch):
    own = tmp_path / "native" / SOURCE.name
    own.parent.mkdir()
    for file in (SOURCE, *SOURCE.parent.glob("*.h")):
        (own.parent / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(sys.modules[build.__module__], "SOURCE", own)
    environment = {**os.environ, "FP8GEMM_CACHE": str(tmp_path / "cache"), "CXX": fake_compiler(tmp_path, "touch")}
    first = library_of(environment)
    assert library_of(environment) == first
    header = own.with_name("numbers.h")
    header.write_text(header.read_text() + "// changed\n")
    second = library_of(environment)
    header.rename(own.with_name("renamed.h"))
    third = library_of(environment)
    assert len({first, second, third}) == 3
    carried = own.with_name(carried_name(source_digest(own)))
    carried.touch()
    assert library_of(environment) == carried
    own.with_name("added.h").touch()
    assert library_of(environment) not in {first, second, third, carried}


def test_where_a_library_came_from(tmp_path, monkeypatch):
    """Carried, compiled or cached; and with which compiler, by the first line of its version."""
    own = tmp_path / "native" / SOURCE.name
    own.parent.mkdir()
    own.touch()
    monkeypatch.setattr(sys.modules[build.__module__], "SOURCE", own)
    compiler = Path(fake_compiler(tmp_path, "touch"))
    compiler.write_text(compiler.read_text().replace("exit 0", "echo g++ 14.2.0 && echo Copyright && exit 0"))
    environment = {**os.environ, "FP8GEMM_CACHE": str(tmp_path / "cache"), "CXX": str(compiler)}
    assert build(environment).origin == "compiled now by g++ 14.2.0"
    assert build(environment).origin == "from the cache, compiled by g++ 14.2.0"
    own.with_name(carried_name(source_digest(own))).touch()
    assert build(environment).origin == "carried by the installed package"
    assert str(Compiler(("/usr/bin/c++", "-O1"), "\n")) == "/usr/bin/c++ -O1"  # one that says nothing


def test_the_package_carries_the_source_and_its_headers():
    """Of what ``pyproject.toml`` names as package data, in a checkout."""
    tomllib = pytest.importorskip("tomllib")
    project = Path(__file__).parents[2] / "pyproject.toml"
    patterns = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["fp8gemm"]
    included = {line.split('"')[1] for file in (SOURCE, *SOURCE.parent.glob("*.h")) for line in quoted(file)}
    assert {"driver.h", "amx_many.h", "panels.h"} <= included
    for name in (SOURCE.name, *sorted(included)):
        assert SOURCE.with_name(name).is_file(), name
        assert any(PurePath("native", name).match(pattern) for pattern in patterns), name


def quoted(file: Path) -> list[str]:
    """The lines that include one of the package's headers."""
    return [line for line in file.read_text().splitlines() if line.startswith('#include "')]


def test_new_folders_are_the_users_alone(tmp_path):
    before = os.umask(0o002)
    try:
        cache = tmp_path / "new" / "parents" / "cache"
        environment = {**os.environ, "FP8GEMM_CACHE": str(cache), "CXX": fake_compiler(tmp_path, "touch")}
        library_of(environment)
    finally:
        os.umask(before)
    for folder in (cache, cache.parent, cache.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder


def test_what_killed_builds_left_goes(tmp_path):
    """A build that is killed while its compiler continues; and other kinds of leftovers."""
    slow = fake_compiler(tmp_path / "slow", "sleep 2; touch")
    environment = {**os.environ, "FP8GEMM_CACHE": str(tmp_path / "cache"), "CXX": slow}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    victim = subprocess.Popen(
        [sys.executable, "-c", "from fp8gemm import native; native.find()"], env=environment, start_new_session=True
    )
    cache = tmp_path / "cache"
    for _ in range(600):
        if cache.is_dir() and any(cache.glob("*.part")):
            break
        time.sleep(0.1)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert any(cache.glob("*.part"))
    (cache / "tmpabcdef.part").touch()  # as earlier versions left them
    (cache / "elsewhere.77.0000.part").mkdir()
    old = time.time() - 2 * COMPILE_SECONDS
    os.utime(cache / "elsewhere.77.0000.part", (old, old))
    (cache / "elsewhere.78.0000.part").mkdir()  # in use on another host
    library = library_of({**environment, "CXX": fake_compiler(tmp_path, "touch")})
    time.sleep(2.5)  # until the remaining compiler has finished
    assert sorted(path.name for path in cache.iterdir()) == ["elsewhere.78.0000.part", library.name]


def test_everything_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{handle}')).suffix or 'folder'}")
        fsync(handle)

    def renamed(source, target) -> None:
        events.append("rename")
        replace(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to tell which file is flushed")
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    environment = {**os.environ, "FP8GEMM_CACHE": str(tmp_path / "cache"), "CXX": fake_compiler(tmp_path, "touch")}
    library_of(environment)
    assert events == ["fsync .so", "rename", "fsync folder"]


def test_compiling_says_so_once(tmp_path):
    environment = {"FP8GEMM_CACHE": str(tmp_path / "cache"), "CXX": fake_compiler(tmp_path, "touch")}
    code = "from fp8gemm import native; native.build()"
    line = f"fp8gemm is compiling its CPU kernels into {tmp_path / 'cache'}; this happens once and takes some seconds\n"
    assert run_in_process(code, **environment).stderr == line
    assert run_in_process(code, **environment).stderr == ""
    quiet = {**environment, "FP8GEMM_CACHE": str(tmp_path / "other"), "TQDM_DISABLE": "1"}
    assert run_in_process(code, **quiet).stderr == ""
