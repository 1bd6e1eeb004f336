"""Compiles the kernels with the system's C++ compiler into a cache directory that only the user may write."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("fp8gemm.cpp")
COMPILERS = ("c++", "g++", "clang++")
# No flag names a CPU: each kernel is compiled for its own instruction set and chosen at run time, so that a cache in
# a shared home directory serves machines that differ. Nothing links OpenMP: its symbols come from torch's.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w")
# Vectors of sums use fused multiply-add where there is one; loops vectorize since no trap is watched.
FLOAT_FLAGS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
DARWIN_FLAGS = ("-undefined", "dynamic_lookup")
COMPILE_SECONDS = 300


@dataclass(frozen=True)
class Unavailable:
    """Why there are no compiled kernels here."""

    reason: str


def build(environment: Mapping[str, str] = os.environ) -> Path | Unavailable:
    """The shared library: the one that came with the package, else from the cache, else compiled into it now."""
    if environment.get("FP8GEMM_NATIVE") == "0":
        return Unavailable("FP8GEMM_NATIVE=0 turns the compiled kernels off")
    if not hasattr(os, "getuid"):
        return Unavailable(f"the compiled kernels need Linux or macOS, found {sys.platform}")
    source = SOURCE.read_bytes()
    carried = SOURCE.with_name(carried_name(source))
    if carried.exists():
        return carried
    found = _compiler(environment)
    if isinstance(found, Unavailable):
        return found
    command, version = found
    flags = FLAGS + FLOAT_FLAGS + (DARWIN_FLAGS if sys.platform == "darwin" else ())
    key = _digest(source, version.encode(), " ".join((*command, *flags)).encode(), platform.machine().encode())
    directory = cache_directory(environment)
    refused = _refusal(directory)
    if refused is not None:
        return refused
    library = directory / f"fp8gemm-{key}.so"
    if library.exists():
        return _refusal(library) or library
    return compile_to(library, (*command, *flags))


def carried_name(source: bytes) -> str:
    """The name under which a wheel carries the library made from ``source`` beside it."""
    return f"fp8gemm-{platform.machine()}-{_digest(source)}.so"


def cache_directory(environment: Mapping[str, str]) -> Path:
    """``FP8GEMM_CACHE``, else ``fp8gemm`` in the user's cache directory."""
    if environment.get("FP8GEMM_CACHE"):
        return Path(environment["FP8GEMM_CACHE"])
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fp8gemm"


def compile_to(library: Path, command: tuple[str, ...]) -> Path | Unavailable:
    """Compile to a file of another name, then rename: other processes see a whole library or none."""
    handle, name = tempfile.mkstemp(suffix=".part", dir=library.parent)
    os.close(handle)
    try:
        result = subprocess.run(
            [*command, "-o", name, str(SOURCE)], capture_output=True, text=True, timeout=COMPILE_SECONDS
        )
        if result.returncode != 0:
            last = "\n".join(result.stderr.strip().splitlines()[-5:])
            return Unavailable(f"{shlex.join(command)} failed with status {result.returncode}: {last}")
        os.chmod(name, 0o700)
        os.replace(name, library)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Unavailable(f"{shlex.join(command)} did not run: {error}")
    finally:
        Path(name).unlink(missing_ok=True)
    return library


def _compiler(environment: Mapping[str, str]) -> tuple[tuple[str, ...], str] | Unavailable:
    """The command of a C++ compiler, and what it says of its version."""
    named = environment.get("CXX")
    names = (named,) if named else COMPILERS
    for name in names:
        command = tuple(shlex.split(name))
        path = shutil.which(command[0], path=environment.get("PATH")) if command else None
        if path is None:
            continue
        command = (path, *command[1:])
        try:
            result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=COMPILE_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Unavailable(f"{name} --version did not run: {error}")
        if result.returncode == 0:
            return command, result.stdout
    origin = "CXX" if named else "PATH"
    return Unavailable(f"no C++ compiler: looked for {', '.join(names)} ({origin}); install one, or set CXX")


def _refusal(path: Path) -> Unavailable | None:
    """Why code in ``path`` must not be run: someone else may have written it. A directory is made where none is."""
    try:
        if not path.exists():
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        return Unavailable(f"the cache directory {path} cannot be used: {error}; set FP8GEMM_CACHE to another")
    if status.st_uid != os.getuid():
        return Unavailable(
            f"{path} belongs to user {status.st_uid}, not to {os.getuid()}; set FP8GEMM_CACHE to another"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return Unavailable(
            f"{path} may be written by others (mode {stat.S_IMODE(status.st_mode):o}); run chmod go-w on it"
        )
    return None


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:20]
