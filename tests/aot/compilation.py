"""Ahead-of-time compilation of whatever the engine would launch, for cards that are not here.

Launches are recorded from the engine's own code, given tensors without memory, then specialized, compiled and
disassembled as Triton would on the card.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fp8gemm.engines.triton import launch
from fp8gemm.engines.triton.kernels import block, grouped, quantize, row, w8a16
from fp8gemm.engines.triton.launch import ALWAYS


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What one call of ``launch`` was given."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__} {self.constants} {self.options}"


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What became of a kernel: registers a thread, bytes that were read back after they left them, shared memory, and
    whether matrix units multiply."""

    registers: int
    spills: int
    shared: int
    matrix: bool
    cubin: bytes = field(repr=False)

    @property
    def slow(self) -> int:
        """Conversions from float16 to bfloat16, which run at a quarter of the rate of others."""
        return len(re.findall(r"\bF2F\.BF16\.F16", _assembly(self.cubin)))

    @property
    def fp8(self) -> bool:
        """Whether matrix units multiply FP8 operands, which are not decoded to 16 bits before."""
        return re.search(r"\b(?:QMMA|QGMMA|UTCQMMA)\b", _assembly(self.cubin)) is not None

    @property
    def adds(self) -> int:
        """Additions in float32."""
        return len(re.findall(r"\bFADD\b", _assembly(self.cubin)))

    @property
    def step(self) -> Counter[str]:
        """The instructions of the shortest loop that multiplies matrices, by name; none without such a loop."""
        lines = [
            (int(address, 16), text)
            for address, text in re.findall(
                r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([^;]+);", _assembly(self.cubin), re.M
            )
        ]
        loops = []
        for end, text in lines:
            start = re.match(r"BRA\b.*?(0x[0-9a-f]+)", text)
            if start and int(start[1], 16) <= end:
                inside = (text for at, text in lines if int(start[1], 16) <= at <= end)
                loops.append(Counter(re.split(r"[. ]", text)[0] for text in inside))
        return min((loop for loop in loops if loop["QMMA"]), key=Counter.total, default=Counter())


_COMPILED: dict[object, Compiled] = {}


def recorded(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches that ``call`` makes."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: Any, **options: int) -> None:
        assert all(1 <= side < 65536 or index == 0 for index, side in enumerate(grid)), grid
        assert grid[0] < 2**31
        launches.append(Launch(kernel=kernel, args=args, constants=constants, options=options))

    for module in (block, grouped, quantize, row, w8a16, launch):
        monkeypatch.setattr(module, "launch", record)
    call()
    return launches


def variant(launch: Launch, capability: tuple[int, int]) -> tuple[str, ...]:
    """What Triton keeps compiled kernels by: launches with the same variant need no further compilation."""
    _, _, specialization, options = _bound(launch, capability)
    return launch.kernel.__module__, launch.kernel.__name__, str(specialization), str(sorted(options.items()))


def compile_for(launch: Launch, capability: tuple[int, int]) -> Compiled:
    """Specializes on the arguments as a real launch does, compiles for ``capability``, and reads the machine code."""
    key = (capability, *variant(launch, capability))
    if key not in _COMPILED:
        _COMPILED[key] = _compile(launch, capability)
    return _COMPILED[key]


def _compile(launch: Launch, capability: tuple[int, int]) -> Compiled:
    backend, bound, specialization, given = _bound(launch, capability)
    kernel = launch.kernel
    options, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, given)
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=_target(capability), options=options.__dict__)
    cubin, ptx = binary.asm["cubin"], binary.asm["ptx"]
    matrix = re.search(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx) is not None
    return Compiled(**_resources(cubin), shared=binary.metadata.shared, matrix=matrix, cubin=cubin)


def _target(capability: tuple[int, int]) -> GPUTarget:
    major, minor = capability
    return GPUTarget("cuda", 10 * major + minor, 32)


def _bound(launch: Launch, capability: tuple[int, int]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The compiler for a card, the arguments by name, what Triton specializes on in each, and the options."""
    backend, bind = _binder(launch.kernel, capability)
    return backend, *bind(*launch.args, **launch.constants, **launch.options, **ALWAYS)


@cache
def _binder(kernel: Any, capability: tuple[int, int]) -> tuple[Any, Callable[..., Any]]:
    backend = make_backend(_target(capability))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and spills; a stack that is never read holds arguments of a call that ptxas added, not spills."""
    text = _cuobjdump(cubin, "-res-usage")
    registers, stack = (int(found) for found in re.search(r"REG:(\d+) STACK:(\d+)", text).groups())  # type: ignore[union-attr]
    return {"registers": registers, "spills": stack if stack and re.search(r"\bLDL\b", _assembly(cubin)) else 0}


@cache
def _assembly(cubin: bytes) -> str:
    return _cuobjdump(cubin, "-sass")


def _cuobjdump(cubin: bytes, flag: str) -> str:
    """The output of Triton's disassembler, or of ``$CUOBJDUMP``: Triton 3.6 compiles for sm_103, which its own cannot
    read."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = os.environ.get("CUOBJDUMP", bundled)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}; set CUOBJDUMP to that of a newer Triton or CUDA")
    return done.stdout + done.stderr
