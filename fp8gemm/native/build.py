"""Compiles the kernels with the system's C++ compiler into a cache directory that only the user may write.

A compiled library is called ``fp8gemm-SOURCE-CONTENT.so``: a digest of all that went into it and one of its own bytes,
which are compared before it is loaded. Whatever goes wrong is a reason to do without, never an exception.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..progress import announce

SOURCE = Path(__file__).with_name("fp8gemm.cpp")
COMPILERS = ("c++", "g++", "clang++")
# No flag names a CPU: each kernel is compiled for its own instruction set and chosen at run time, so that a cache in
# a shared home directory serves machines that differ. Nothing links OpenMP: its symbols come from torch's.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w")
# Vectors of sums use fused multiply-add where there is one; loops vectorize since no trap is watched.
FLOAT_FLAGS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
DARWIN_FLAGS = ("-undefined", "dynamic_lookup")
COMPILE_SECONDS = 300
ABANDONED = ".part"  # what a name ends with while its owner works there


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
    try:
        return _build(environment)
    except (OSError, RuntimeError, ValueError) as error:  # of file systems, of homes that are not there, of odd paths
        return Unavailable(f"the compiled kernels cannot be made: {error}; set FP8GEMM_CACHE to a folder of your own")


def _build(environment: Mapping[str, str]) -> Path | Unavailable:
    source = SOURCE.read_bytes()
    carried = SOURCE.with_name(carried_name(source))
    if carried.exists():
        return carried
    found = _compiler(environment)
    if isinstance(found, Unavailable):
        return found
    command, version = found
    flags = FLAGS + FLOAT_FLAGS + (DARWIN_FLAGS if sys.platform == "darwin" else ())
    # The C library too, as homes are shared between machines: one built for a newer one does not load on an older.
    system = " ".join((platform.machine(), *platform.libc_ver()))
    key = _digest(
        source, version.encode(), " ".join((*command, *flags)).encode("utf-8", "surrogateescape"), system.encode()
    )
    directory = cache_directory(environment)
    refused = _make_directory(directory) or _refusal(directory)
    if refused is not None:
        return refused
    _clear_abandoned(directory)
    for library in sorted(directory.glob(f"fp8gemm-{key}-*.so")):
        with suppress(FileNotFoundError):  # another process has just removed it
            if (refused := _refusal(library)) is not None:
                return refused
            if library.name == _library_name(key, library.read_bytes()):
                return library
            library.unlink()  # cut short or overwritten: it would kill whoever loads it
    announce(f"fp8gemm compiles its CPU kernels into {directory}, once; this takes some seconds")
    return compile_to(directory, key, (*command, *flags))


def carried_name(source: bytes) -> str:
    """The name under which a wheel carries the library made from ``source`` beside it."""
    return f"fp8gemm-{platform.machine()}-{_digest(source)}.so"


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """``FP8GEMM_CACHE``, else ``fp8gemm`` in the user's cache directory; ``~`` is the user's home.

    Raises:
        RuntimeError: there is no home directory to expand.
    """
    if environment.get("FP8GEMM_CACHE"):
        return Path(environment["FP8GEMM_CACHE"]).expanduser()
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "fp8gemm"


def compile_to(directory: Path, key: str, command: tuple[str, ...]) -> Path | Unavailable:
    """Compile in a folder of this process's own, then move the library, whole and on disk, to its name."""
    with _workplace(directory) as workplace:
        made = workplace / "fp8gemm.so"
        try:
            result = _run([*command, "-o", str(made), str(SOURCE)])
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            return Unavailable(f"{shlex.join(command)} did not run: {error}")
        if result.returncode != 0:
            last = "\n".join(result.stderr.strip().splitlines()[-5:])
            return Unavailable(f"{shlex.join(command)} failed with status {result.returncode}: {last}")
        if not made.exists():
            return Unavailable(f"{shlex.join(command)} succeeded and wrote nothing")
        made.chmod(0o700)
        library = directory / _library_name(key, made.read_bytes())
        _flush(made)
        os.replace(made, library)
        _flush(directory)
        return library


def _library_name(key: str, content: bytes) -> str:
    return f"fp8gemm-{key}-{_digest(content)}.so"


@contextmanager
def _workplace(directory: Path) -> Iterator[Path]:
    """A new folder in ``directory`` whose name says which process works there; it goes at the end."""
    path = directory / f"{socket.gethostname()}.{os.getpid()}.{os.urandom(4).hex()}{ABANDONED}"
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _clear_abandoned(directory: Path) -> None:
    """Removes what killed builds left: here those of processes that are gone, from other hosts what is old."""
    for path in directory.glob(f"*{ABANDONED}"):
        with suppress(FileNotFoundError):  # another process has just removed it
            host, _, process = path.name.removesuffix(ABANDONED).rpartition(".")[0].rpartition(".")
            if process.isdigit() and host == socket.gethostname():
                works = _alive(int(process))
            else:
                works = bool(host) and time.time() - path.stat().st_mtime < COMPILE_SECONDS
            if not works and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif not works:
                path.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """What a compiler says may be in any encoding."""
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS)


def _compiler(environment: Mapping[str, str]) -> tuple[tuple[str, ...], str] | Unavailable:
    """The command of a C++ compiler, and what it says of its version."""
    named = environment.get("CXX")
    names = (named,) if named else COMPILERS
    for name in names:
        try:
            command = tuple(shlex.split(name))
            path = shutil.which(command[0], path=environment.get("PATH")) if command else None
            if path is None:
                continue
            command = (path, *command[1:])
            result = _run([*command, "--version"])
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            return Unavailable(f"{name!r} is no compiler that runs: {error}; install one, or set CXX")
        if result.returncode == 0:
            return command, result.stdout
    origin = "CXX" if named else "PATH"
    return Unavailable(f"no C++ compiler: looked for {', '.join(names)} ({origin}); install one, or set CXX")


def _make_directory(directory: Path) -> Unavailable | None:
    """Makes a directory and those above it that are missing, all for this user alone; why that cannot be done."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        return _unusable(directory, error)
    return None if directory.is_dir() else _unusable(directory, "it is not a directory")


def _refusal(path: Path) -> Unavailable | None:
    """Why code in ``path`` must not be run: someone else may have written it."""
    status = path.stat()
    if status.st_uid != os.getuid():
        return Unavailable(
            f"{path} belongs to user {status.st_uid}, not to {os.getuid()}; set FP8GEMM_CACHE to another"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return Unavailable(
            f"{path} may be written by others (mode {stat.S_IMODE(status.st_mode):o}); run chmod go-w on it"
        )
    return None


def _unusable(directory: Path, why: object) -> Unavailable:
    return Unavailable(f"the cache directory {directory} cannot be used: {why}; set FP8GEMM_CACHE to another")


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:20]
