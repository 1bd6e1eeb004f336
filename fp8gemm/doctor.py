"""What this machine can run: versions, devices, and which engine ``auto`` takes for each scheme, or why none."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch

from . import native
from .engines import ENGINES, Machine, MatmulSpec, choose, probe
from .errors import UnsupportedError
from .scaled import SCHEMES

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def examine() -> dict[str, Any]:
    """Facts in plain types: ``versions``, ``native`` and ``devices`` with their ``machine`` and ``choices``."""
    found = native.find()
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "native": f"{found.path}, {found.instructions}" if isinstance(found, native.Library) else found.reason,
        "devices": {str(device): _examine_device(device) for device in devices()},
    }


def devices() -> list[torch.device]:
    """The CPU, and every accelerator that torch can use."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for kind in ("xpu", "mps"):
        if getattr(torch, kind).is_available():
            found.append(torch.device(kind))
    return found


def _examine_device(device: torch.device) -> dict[str, Any]:
    machine = probe(device)
    return {
        "name": machine.name,
        "capability": machine.capability,
        "features": sorted(machine.features),
        "found": {name: str(facts) for name, facts in machine.found.items()},
        "choices": {
            f"{scheme}, {str(dtype).removeprefix('torch.')}": _choice(machine, scheme, dtype)
            for scheme in SCHEMES
            for dtype in _DTYPES
        },
        "engines": {
            name: engine.rejects(MatmulSpec(scheme=SCHEMES["row"], n=4096, k=4096), machine)
            for name, engine in ENGINES.items()
        },
    }


def _choice(machine: Machine, scheme: str, dtype: torch.dtype) -> str:
    spec = MatmulSpec(scheme=SCHEMES[scheme], n=4096, k=4096, compute_dtype=dtype)  # type: ignore[index]
    try:
        return choose(spec, machine).winner
    except UnsupportedError:
        return "none"


def tell(facts: Mapping[str, Any]) -> str:
    """The facts as text."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    lines = [versions, f"compiled CPU kernels: {facts['native']}"]
    for device, found in facts["devices"].items():
        features = f" ({', '.join(found['features'])})" if found["features"] else ""
        lines.append(f"{device}: {found['name']}{features}")
        lines += [f"  found for {name}: {facts}" for name, facts in found["found"].items()]
        lines += [f"  {asked}: {winner}" for asked, winner in found["choices"].items()]
        lines += ["  row scales, bfloat16, by engine:"]
        lines += [f"    {name}: {'; '.join(reasons) or 'can'}" for name, reasons in found["engines"].items()]
    return "\n".join(lines)
