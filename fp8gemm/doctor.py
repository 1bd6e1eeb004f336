"""Examining this machine: versions, devices, and which engine ``auto`` chooses for each scheme, or why none."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import native
from .engines import ENGINES, Machine, MatmulSpec, choose, probe
from .errors import UnsupportedError
from .scaled import SCHEMES

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class ExaminedDevice:
    """A device: what each engine ``found`` on it, the engine that ``auto`` chooses for each scheme and dtype, and by
    engine why row scales in bfloat16 are rejected, empty if they are not."""

    name: str
    capability: tuple[int, int] | None
    features: tuple[str, ...]
    found: Mapping[str, str]
    choices: Mapping[str, str]
    engines: Mapping[str, list[str]]

    def __str__(self) -> str:
        """The text after torch's name of the device."""
        lines = [f"{self.name} ({', '.join(self.features)})" if self.features else self.name]
        lines += [f"  found for {name}: {facts}" for name, facts in self.found.items()]
        lines += [f"  {asked}: {winner}" for asked, winner in self.choices.items()]
        lines += ["  row scales, bfloat16, by engine:"]
        lines += [f"    {name}: {'; '.join(reasons) or 'can'}" for name, reasons in self.engines.items()]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The result of ``examine``; ``native`` is the path of the compiled CPU kernels, their instruction level and where
    the library came from, or why there are none."""

    versions: Mapping[str, str | None]
    native: str
    devices: Mapping[str, ExaminedDevice]

    def to_dict(self) -> dict[str, Any]:
        """The whole result in plain Python types."""
        return asdict(self)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        devices = (f"{device}: {found}" for device, found in self.devices.items())
        return "\n".join([versions, f"compiled CPU kernels: {self.native}", *devices])


def examine() -> Examination:
    """Probes every engine on every device; the first call in a process may compile the CPU kernels."""
    found = native.find()
    return Examination(
        versions={"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        native=_describe(found),
        devices={str(device): _examine_device(device) for device in devices()},
    )


def devices() -> list[torch.device]:
    """The CPU, and every accelerator that torch can use."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for kind in ("xpu", "mps"):
        if getattr(torch, kind).is_available():
            found.append(torch.device(kind))
    return found


def _describe(found: native.Library | native.Unavailable) -> str:
    if isinstance(found, native.Unavailable):
        return found.reason
    return f"{found.path}, {found.instructions}, {found.origin}"


def _examine_device(device: torch.device) -> ExaminedDevice:
    machine = probe(device)
    return ExaminedDevice(
        name=machine.name,
        capability=machine.capability,
        features=tuple(sorted(machine.features)),
        found={name: str(facts) for name, facts in machine.found.items()},
        choices={
            f"{scheme}, {str(dtype).removeprefix('torch.')}": _choice(machine, scheme, dtype)
            for scheme in SCHEMES
            for dtype in _DTYPES
        },
        engines={
            name: engine.rejects(MatmulSpec(scheme=SCHEMES["row"], n=4096, k=4096), machine)
            for name, engine in ENGINES.items()
        },
    )


def _choice(machine: Machine, scheme: str, dtype: torch.dtype) -> str:
    spec = MatmulSpec(scheme=SCHEMES[scheme], n=4096, k=4096, compute_dtype=dtype)  # type: ignore[index]
    try:
        return choose(spec, machine).winner
    except UnsupportedError:
        return "none"
