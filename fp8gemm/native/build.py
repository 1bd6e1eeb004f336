"""Finding the compiled kernels: in the package, or in a cache that only the user can write, or compiled into it now.

A compiled library is called ``fp8gemm-SOURCE-CONTENT.so``: a digest of everything that went into it, and one of its own
bytes, which is verified before loading. Any failure becomes a reason why there are no kernels, never an exception.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..progress import announce
from .compiler import (
    COMPILE_SECONDS,
    Unavailable,
    carried_name,
    compile_source,
    digest,
    find_compiler,
    source_digest,
    turned_off,
)

SOURCE = Path(__file__).with_name("fp8gemm.cpp")  # its headers lie beside it
ABANDONED = ".part"  # suffix of a directory while its owner works in it


@dataclass(frozen=True)
class Built:
    """A shared library, and where it came from, as a phrase: carried by the package, from the cache, or compiled."""

    path: Path
    origin: str


def build(environment: Mapping[str, str] = os.environ) -> Built | Unavailable:
    """The shared library: the one in the package, else from the cache, else compiled into the cache now."""
    if (off := turned_off(environment)) is not None:
        return off
    try:
        return _build(environment)
    except (OSError, RuntimeError, ValueError) as error:  # of file systems, missing home directories, or odd paths
        return Unavailable(f"the compiled kernels cannot be built: {error}; set FP8GEMM_CACHE to a folder of your own")


def _build(environment: Mapping[str, str]) -> Built | Unavailable:
    source = source_digest(SOURCE)
    carried = SOURCE.with_name(carried_name(source))
    if carried.exists():
        return Built(carried, "carried by the installed package")
    compiler = find_compiler(environment)
    if isinstance(compiler, Unavailable):
        return compiler
    command = (*compiler.command, *compiler.flags)
    # With the C library's version: a home may be shared, and a library built for a newer one does not load on an older.
    system = " ".join((platform.machine(), *platform.libc_ver()))
    key = digest(
        source.encode(),
        compiler.version.encode(),
        " ".join(command).encode("utf-8", "surrogateescape"),
        system.encode(),
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
                return Built(library, f"from the cache, compiled by {compiler}")
            library.unlink()  # truncated or overwritten: loading it would crash the process
    announce(f"fp8gemm is compiling its CPU kernels into {directory}; this happens once and takes some seconds")
    compiled = compile_to(directory, key, command)
    return compiled if isinstance(compiled, Unavailable) else Built(compiled, f"compiled now by {compiler}")


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """``FP8GEMM_CACHE``, else ``fp8gemm`` in the user's cache directory; ``~`` is expanded.

    Raises:
        RuntimeError: there is no home directory.
    """
    if environment.get("FP8GEMM_CACHE"):
        return Path(environment["FP8GEMM_CACHE"]).expanduser()
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "fp8gemm"


def compile_to(directory: Path, key: str, command: tuple[str, ...]) -> Path | Unavailable:
    """Compiles in a directory of this process, then moves the complete library, flushed to disk, to its name."""
    with _workplace(directory) as workplace:
        made = workplace / "fp8gemm.so"
        if (failed := compile_source(command, SOURCE, made)) is not None:
            return failed
        made.chmod(0o700)
        library = directory / _library_name(key, made.read_bytes())
        _flush(made)
        os.replace(made, library)
        _flush(directory)
        return library


def _library_name(key: str, content: bytes) -> str:
    return f"fp8gemm-{key}-{digest(content)}.so"


@contextmanager
def _workplace(directory: Path) -> Iterator[Path]:
    """A new directory in ``directory`` whose name identifies this process; it is removed at the end."""
    path = directory / f"{socket.gethostname()}.{os.getpid()}.{os.urandom(4).hex()}{ABANDONED}"
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _clear_abandoned(directory: Path) -> None:
    """Removes leftovers of killed builds: of dead processes on this host, and old ones of other hosts."""
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
    except PermissionError:  # another user's process
        return True
    return True


def _flush(path: Path) -> None:
    """Flushes a file, or the names in a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_directory(directory: Path) -> Unavailable | None:
    """Makes a directory and its missing parents, for this user alone; returns why that is impossible, or None."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        return _unusable(directory, error)
    return None if directory.is_dir() else _unusable(directory, "it is not a directory")


def _refusal(path: Path) -> Unavailable | None:
    """Why code in ``path`` must not be loaded: another user may have written it."""
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
