"""The parts of the build that pyproject.toml cannot describe: the compiled library of a wheel, and the wheel's tag.

A wheel carries the library that ``fp8gemm.native.build`` looks for first, compiled by the same function with the same
flags. Without a compiler, or with ``FP8GEMM_NATIVE=0``, it carries none and is for any machine. An editable install
carries none either: the library is compiled at first use, again after each change of the source.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

COMPILER = Path(__file__).with_name("fp8gemm") / "native" / "compiler.py"
# The platform tag manylinux2014 (PEP 599): the libraries that a machine is sure to have, of which a wheel for fp8gemm
# could need these, and the newest version that their symbols may have.
LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2"}
LIBRARIES |= {"libstdc++.so.6", "libgcc_s.so.1"}
NEWEST = {"GLIBC": (2, 17), "GLIBCXX": (3, 4, 19), "CXXABI": (1, 3, 7), "GCC": (4, 8, 0)}


@dataclass(frozen=True)
class Need:
    """What a library needs of another one: a symbol of some version, or, if these are empty, just to be there."""

    library: str
    symbol: str = ""
    version: str = ""

    def __str__(self) -> str:
        return f"{self.symbol}@{self.version} of {self.library}" if self.version else self.library

    def too_new(self) -> bool:
        """Whether a machine that manylinux2014 stands for may lack this."""
        name, _, number = self.version.rpartition("_")
        if self.library not in LIBRARIES or not self.version:
            return self.library not in LIBRARIES
        parts = number.split(".")
        known = name in NEWEST and all(part.isdecimal() for part in parts)
        return not known or tuple(map(int, parts)) > NEWEST[name]


def needs(library: Path) -> Iterator[Need]:
    """The libraries that an ELF file needs, and the versions of their symbols."""
    from elftools.elf.elffile import ELFFile  # a wheel on Linux needs it, an editable install does not

    with library.open("rb") as file:
        elf = ELFFile(file)
        for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED"):
            yield Need(tag.needed)
        versions, symbols = elf.get_section_by_name(".gnu.version"), elf.get_section_by_name(".dynsym")
        if (needed := elf.get_section_by_name(".gnu.version_r")) is None:
            return
        names: dict[int, list[str]] = {}
        for index, symbol in enumerate(symbols.iter_symbols()):
            names.setdefault(versions.get_symbol(index)["ndx"], []).append(symbol.name)
        for other, used in needed.iter_versions():
            for version in used:
                for name in names.get(version["vna_other"], [""]):  # a version may be needed without a symbol
                    yield Need(other.name, name, version.name)


def platform_tag(default: str, machine: str, required: Iterable[Need]) -> tuple[str, list[str]]:
    """The platform that a wheel with a library for ``machine`` runs on, and what keeps it from being manylinux2014.

    ``default`` is setuptools' tag for this machine, and ``required`` what the library needs of others.
    """
    if default != "linux_x86_64":
        return default.replace("universal2", machine), []  # the library is for one of the two machines
    newer = [str(need) for need in required if need.too_new()]
    return default if newer else "manylinux2014_x86_64", newer


def load_compiler() -> ModuleType:
    """The module ``fp8gemm.native.compiler`` without its package, which would import torch."""
    spec = importlib.util.spec_from_file_location("fp8gemm_compiler", COMPILER)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_carried(source: Path) -> Path | str:
    """Compiles ``source`` to the library that a package with this source looks for; or returns why that failed."""
    compiler = load_compiler()
    found = compiler.turned_off(os.environ) or compiler.find_compiler(os.environ)
    if isinstance(found, compiler.Unavailable):
        return found.reason
    library = source.with_name(compiler.carried_name(compiler.source_digest(source)))
    command = (*found.command, *found.flags, *compiler.WHEEL_FLAGS.get(platform.machine(), ()))
    if (failed := compiler.compile_source(command, source, library)) is not None:
        library.unlink(missing_ok=True)
        return failed.reason
    try:
        ctypes.CDLL(str(library))
    except OSError as error:  # of a compiler for another machine
        library.unlink()
        return f"{found} made a library that cannot be loaded: {error}"
    library.chmod(0o755)
    return library


class BuildPackage(build_py):
    """Copies the package, for a wheel without what an earlier build left there, and compiles the library in it."""

    library: Path | None = None

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        package = Path(self.build_lib) / "fp8gemm"
        if package.resolve() != COMPILER.parents[1].resolve():  # as with --build-lib=.
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        compiled = compile_carried(package.absolute() / "native" / "fp8gemm.cpp")
        if isinstance(compiled, str):
            self.warn(f"the wheel carries no compiled library: {compiled}")
        else:
            self.library = compiled


class BuildWheel(bdist_wheel):
    """Tags a wheel by the library in it: any Python, and the platforms where the library runs."""

    def run(self) -> None:
        shutil.rmtree(self.bdist_dir, ignore_errors=True)  # a killed build leaves one, whose files would be packed
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        library = self.get_finalized_command("build_py").library
        if library is None:
            return super().get_tag()
        self.root_is_pure = False
        *_, default = super().get_tag()
        try:
            tag, newer = platform_tag(default, platform.machine(), needs(library))
        except ImportError as error:
            tag, newer = default, [f"what cannot be found out without pyelftools ({error})"]
        if newer:
            self.warn(f"the wheel is tagged {tag}, not manylinux2014: its library needs {', '.join(newer)}")
        return "py3", "none", tag


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": BuildWheel})
