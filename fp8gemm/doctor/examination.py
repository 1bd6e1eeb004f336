"""Examining this machine: versions, devices, and which engine ``auto`` chooses for each scheme, or why none."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from .. import native
from ..engines import ENGINES, Machine, MatmulSpec, choose
from ..engines import probe as place
from ..errors import UnsupportedError
from ..scaled import SCHEMES
from ..text import columns
from .known import KnownProblem, known_problems
from .probing import PROBES, ProbedProduct, ProbeName, probe_engines

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class ExaminedDevice:
    """A device: what each engine ``found`` on it, the engine that ``auto`` chooses for each scheme and dtype, and by
    engine why row scales in bfloat16 are rejected, empty if they are not. ``problems`` are known ones of such machines.
    """

    name: str
    capability: tuple[int, int] | None
    features: tuple[str, ...]
    found: Mapping[str, str]
    choices: Mapping[str, str]
    engines: Mapping[str, list[str]]
    problems: tuple[KnownProblem, ...] = ()

    def __str__(self) -> str:
        """The text after torch's name of the device."""
        lines = [f"{self.name} ({', '.join(self.features)})" if self.features else self.name]
        lines += [f"  found for {name}: {facts}" for name, facts in self.found.items()]
        lines += [f"  {asked}: {winner}" for asked, winner in self.choices.items()]
        lines += ["  row scales, bfloat16, by engine:"]
        lines += [f"    {name}: {'; '.join(reasons) or 'can'}" for name, reasons in self.engines.items()]
        lines += ["  known problems:"] if self.problems else []
        lines += [f"    {problem}" for problem in self.problems]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The result of ``examine``; ``native`` is the path of the compiled CPU kernels, their instruction level and where
    the library came from, or why there are none. ``probed`` are the engines' products, if they were probed."""

    versions: Mapping[str, str | None]
    native: str
    devices: Mapping[str, ExaminedDevice]
    probed: tuple[ProbedProduct, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether an engine's product was wrong, raised, or ended its process."""
        return any(product.bad for product in self.probed)

    def to_dict(self) -> dict[str, Any]:
        """The whole result in plain Python types."""
        devices = {
            name: {**vars(device), "problems": [problem.to_dict() for problem in device.problems]}
            for name, device in self.devices.items()
        }
        probed = [asdict(product) for product in self.probed]
        return {"versions": self.versions, "native": self.native, "devices": devices, "probed": probed}

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        devices = (f"{device}: {found}" for device, found in self.devices.items())
        lines = [versions, f"compiled CPU kernels: {self.native}", *devices]
        return "\n".join([*lines, *(_shown(self.probed) if self.probed else [])])


def examine(*, probe: ProbeName = "none", imports: Sequence[str] = ()) -> Examination:
    """Looks for every engine on every device; the first call in a process may compile the CPU kernels.

    ``probe`` says on which devices the engines are probed as well, by products in a process of its own, which first
    imports ``imports``: see ``probe_engines``.

    Raises:
        ValueError: ``probe`` is none of ``"none"``, ``"cpu"`` and ``"all"``.

    Example:
        >>> examine().failed
        False
    """
    if probe not in PROBES:
        raise ValueError(f"probe must be one of {', '.join(PROBES)}, found {probe!r}")
    found, present = native.find(), devices()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions |= {name: _version(name) for name in ("triton", "vllm")}
    probed = [device for device in present if probe == "all" or (probe == "cpu" and device.type == "cpu")]
    products = probe_engines(probed, imports=imports) if probed else ()
    if any(product.fatal for product in products):
        present = []  # looking for the engines would end this process, too
    return Examination(
        versions=versions,
        native=_describe(found),
        devices={str(device): _examine_device(device, versions) for device in present},
        probed=products,
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _shown(probed: tuple[ProbedProduct, ...]) -> list[str]:
    """A table of the products' results by engine and scheme, and what is to be said of those that are not exact."""
    schemes = list(dict.fromkeys(product.scheme for product in probed))
    pairs = list(dict.fromkeys((product.device, product.engine) for product in probed))
    rows = [["device", "engine", *schemes]]
    for device, engine in pairs:
        own = [product for product in probed if (product.device, product.engine) == (device, engine)]
        results = [Counter(product.status for product in own if product.scheme == scheme) for scheme in schemes]
        cells = [", ".join(f"{count} {status}" for status, count in found.items()) for found in results]
        rows.append([device, engine, *cells])
    lines = ["exact products, in a process of their own:", *(f"  {line}" for line in columns(rows))]
    told = [product for product in probed if product.bad and product.status != "not run"]
    return lines + [f"  {', '.join(filter(None, (p.engine, p.scheme, p.case)))}: {p.status}: {p.note}" for p in told]


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


def _examine_device(device: torch.device, versions: Mapping[str, str | None]) -> ExaminedDevice:
    machine = place(device)
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
        problems=known_problems(machine, versions),
    )


def _choice(machine: Machine, scheme: str, dtype: torch.dtype) -> str:
    spec = MatmulSpec(scheme=SCHEMES[scheme], n=4096, k=4096, compute_dtype=dtype)  # type: ignore[index]
    try:
        return choose(spec, machine).winner
    except UnsupportedError:
        return "none"
