"""The system's C++ compiler, and what it is asked to do: at first use by ``build``, for a wheel by ``setup.py``.

``setup.py`` loads this module alone, before the package can be imported: it imports the standard library only.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")
# No flag names a CPU: each kernel is compiled for its own instruction set and chosen at run time, so that a cache in
# a shared home directory serves different machines. OpenMP is not linked: its symbols come from torch's runtime.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w")
# Vector sums may use fused multiply-add; loops vectorize since floating-point traps are not observed.
FLOAT_FLAGS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
DARWIN_FLAGS = ("-undefined", "dynamic_lookup")
# Without this optimization clang 16 compiles the kernels; with it, it crashes.
CLANG_16_FLAGS = ("-mllvm", "-disable-vector-combine")
# What a wheel adds, by machine, since it is for every CPU: a compiler may be set to assume more than the oldest has.
WHEEL_FLAGS = {"x86_64": ("-march=x86-64",), "aarch64": ("-march=armv8-a",)}
COMPILE_SECONDS = 300


@dataclass(frozen=True)
class Unavailable:
    """Why compiled kernels are not available."""

    reason: str


@dataclass(frozen=True)
class Compiler:
    """A compiler's ``command``, and what it printed when asked for its ``version``."""

    command: tuple[str, ...]
    version: str

    def __str__(self) -> str:
        """The first line of the version, such as ``g++ (GCC) 14.2.0``; the command if there is none."""
        return next(iter(self.version.strip().splitlines()), shlex.join(self.command))

    @property
    def flags(self) -> tuple[str, ...]:
        """What it is given in every compilation on this system."""
        darwin = DARWIN_FLAGS if sys.platform == "darwin" else ()
        return FLAGS + FLOAT_FLAGS + darwin + (CLANG_16_FLAGS if "clang version 16." in self.version else ())


def turned_off(environment: Mapping[str, str]) -> Unavailable | None:
    """Why nothing is to be compiled or loaded, whatever compiler there is; None if it may be."""
    if environment.get("FP8GEMM_NATIVE") == "0":
        return Unavailable("FP8GEMM_NATIVE=0 turns the compiled kernels off")
    if not hasattr(os, "getuid"):
        return Unavailable(f"the compiled kernels need Linux or macOS, found {sys.platform}")
    return None


def find_compiler(environment: Mapping[str, str]) -> Compiler | Unavailable:
    """``$CXX``, else the first compiler of ``COMPILERS`` in ``$PATH``; or why there is none."""
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
            return Unavailable(f"{name!r} is not a working compiler: {error}; install one, or set CXX")
        if result.returncode == 0:
            return Compiler(command, result.stdout)
    origin = "CXX" if named else "PATH"
    return Unavailable(f"no C++ compiler: looked for {', '.join(names)} ({origin}); install one, or set CXX")


def compile_source(command: tuple[str, ...], source: Path, library: Path) -> Unavailable | None:
    """Compiles ``source``, with the headers beside it, to ``library``; returns why that failed, or None."""
    try:
        result = _run([*command, f"-I{source.parent}", "-o", str(library), str(source)])
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return Unavailable(f"{shlex.join(command)} did not run: {error}")
    if result.returncode != 0:
        last = "\n".join(result.stderr.strip().splitlines()[-5:])
        return Unavailable(f"{shlex.join(command)} failed with status {result.returncode}: {last}")
    if not library.exists():
        return Unavailable(f"{shlex.join(command)} succeeded and wrote nothing")
    return None


def source_digest(source: Path) -> str:
    """A digest of ``source`` and of the headers beside it, with their names."""
    files = (source, *sorted(source.parent.glob("*.h")))
    return digest(*(part for file in files for part in (file.name.encode(), file.read_bytes())))


def carried_name(source: str) -> str:
    """The name of the library in a wheel, made from the source beside it, whose ``source_digest`` is ``source``."""
    return f"fp8gemm-{platform.machine()}-{source}.so"


def digest(*parts: bytes) -> str:
    """The first 20 hexadecimal digits of a SHA-256 of ``parts`` and their lengths."""
    result = hashlib.sha256()
    for part in parts:
        result.update(len(part).to_bytes(8, "little") + part)
    return result.hexdigest()[:20]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A compiler's output, which may be in any encoding."""
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS)
