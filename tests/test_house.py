"""The layering of the package: imports go only to lower layers, and each third-party package has one importer.

A *room* is a top-level module or folder of the package, a *floor* is a layer of rooms, and the *door* of a third-party
package is the room that may import it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fp8gemm

PACKAGE = Path(fp8gemm.__file__).parent

# From the lowest layer up. A room imports only rooms on lower floors, never on its own or above.
FLOORS = [
    {"errors", "scaled", "progress", "pages", "text"},
    {"native", "numerics"},
    {"engines", "formats"},
    {"weights"},
    {"checkpoint"},
    {"models"},
    {"bench", "doctor"},
    {"analysis"},
    {"cli"},
    {"__init__"},
]
DOORS = {
    "tqdm": {"progress"},
    "safetensors": {"checkpoint"},
    "huggingface_hub": {"checkpoint"},
    "triton": {"engines"},
    "vllm": set(),
    "transformers": {"checkpoint"},
    "diffusers": set(),
    "accelerate": set(),
    "peft": set(),
    "numpy": set(),
}


def imports(source: str, package: list[str]) -> set[str]:
    """The absolute names of modules that a source imports; ``package`` is where relative imports start."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            if node.module:
                found.add(".".join(module))
            else:
                found |= {".".join([*module, alias.name]) for alias in node.names}
    return found


def problems(room: str, source: str, package: list[str]) -> list[str]:
    """The imports of a room of the package that break the rules."""
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    found = []
    for module in sorted(imports(source, package)):
        top, *rest = module.split(".")
        if top == "fp8gemm":
            other = rest[0] if rest else "__init__"
            if other != room and floor[other] >= floor[room]:
                found.append(f"{room} imports {other}, which is not below it")
        elif room not in DOORS.get(top, {room}):
            found.append(f"{room} imports {top}, whose door is {' or '.join(DOORS[top]) or 'closed'}")
    return found


def rooms() -> list[tuple[str, Path]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), file) for file in files]


@pytest.mark.parametrize(("room", "file"), rooms(), ids=lambda value: str(value) if isinstance(value, str) else "")
def test_floors_and_doors(room: str, file: Path) -> None:
    package = ["fp8gemm", *file.relative_to(PACKAGE).parent.parts]
    assert problems(room, file.read_text(), package) == []


def test_the_test_bites() -> None:
    assert problems("numerics", "from .weights.linear import FP8Linear", ["fp8gemm"]) == [
        "numerics imports weights, which is not below it"
    ]
    assert problems("engines", "from ..formats import base", ["fp8gemm", "engines"]) == [
        "engines imports formats, which is not below it"
    ]
    assert problems("weights", "import vllm._custom_ops", ["fp8gemm"]) == ["weights imports vllm, whose door is closed"]
    assert problems("models", "from tqdm import tqdm", ["fp8gemm"]) == ["models imports tqdm, whose door is progress"]
    assert problems("weights", "from ..engines import probe\nimport torch", ["fp8gemm", "weights"]) == []


def large(folder: Path) -> dict[str, int]:
    """The lines of each Python and C++ file that has more than 350."""
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in {".py", ".cpp", ".h"}]
    sizes = {str(file.relative_to(folder)): len(file.read_text().splitlines()) for file in files}
    return {name: size for name, size in sizes.items() if size > 350}


def test_rooms_are_small(tmp_path: Path) -> None:
    assert large(PACKAGE) == {}
    for name, size in {"a.py": 350, "b.py": 351, "c.cpp": 351, "d.h": 352}.items():
        (tmp_path / name).write_text("\n" * size)
    assert large(tmp_path) == {"b.py": 351, "c.cpp": 351, "d.h": 352}


def test_only_the_street_prints() -> None:
    for room, file in rooms():
        if room != "cli":
            calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
            assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), file


FACTORIES = {"arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
FACTORIES |= {"scalar_tensor", "tensor", "zeros"}


def unnamed(source: str) -> list[str]:
    """Calls of torch's factories without dtype or device, whose defaults belong to the user."""
    found = []
    for node in ast.walk(ast.parse(source)):
        function = node.func if isinstance(node, ast.Call) else None
        if (
            isinstance(function, ast.Attribute)
            and ast.unparse(function.value) == "torch"
            and function.attr in FACTORIES
        ):
            missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
            found += [f"line {node.lineno}: torch.{function.attr} without {name}" for name in sorted(missing)]
    return found


def test_every_tensor_that_is_made_names_dtype_and_device() -> None:
    found = {str(file.relative_to(PACKAGE)): unnamed(file.read_text()) for _, file in rooms()}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert unnamed("torch.ones(3, device=x.device)") == ["line 1: torch.ones without dtype"]
    assert unnamed("x.new_ones(3); torch.zeros(3, dtype=x.dtype, device=x.device)") == []


def test_importing_touches_nothing() -> None:
    """No driver, vLLM, Triton or compiler is touched, and no environment variable is changed."""
    script = """
import os, sys, torch
before, modules = dict(os.environ), set(sys.modules)
torch.cuda.init = torch.cuda.is_available = torch.cuda.device_count = None  # calling any would raise
import fp8gemm
assert dict(os.environ) == before
new = {name.split(".")[0] for name in set(sys.modules) - modules}
assert not new & {"vllm", "triton", "transformers", "numpy"}, new
assert fp8gemm.engines.vllm.find.cache_info().currsize == 0
assert fp8gemm.engines.choice._probe.cache_info().currsize == 0
assert fp8gemm.native.find.cache_info().currsize == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True)
