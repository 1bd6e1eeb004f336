"""The setting of a benchmark: the device, the sizes and the versions that its numbers depend on."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata

import torch

from ..engines import probe
from ..errors import UnsupportedError


def device_of(asked: torch.device | str | None) -> torch.device:
    """The requested device; by default the current CUDA device if there is one, else the CPU.

    Raises:
        UnsupportedError: it does not exist, or is neither a CPU nor a CUDA device.
    """
    card = torch.cuda.is_available()
    device = torch.device(("cuda" if card else "cpu") if asked is None else asked)
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"products are timed on cpu and cuda, found {device}")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if card else 0
    if (device.index or 0) >= count:
        raise UnsupportedError(f"{device} does not exist: torch finds {count} CUDA devices; use cpu")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def sizes_of(tokens: Iterable[int]) -> list[int]:
    """The distinct M in ascending order.

    Raises:
        ValueError: there is none, or one is below 1.
    """
    sizes = sorted(set(tokens))
    if not sizes or sizes[0] < 1:
        raise ValueError(f"tokens must be at least 1, found {sizes[0] if sizes else 'none'}")
    return sizes


def shapes_of(shapes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The distinct shapes (N, K).

    Raises:
        ValueError: there is none, or a size is below 1.
    """
    found = list(dict.fromkeys(shapes))
    if not found or min(min(shape) for shape in found) < 1:
        raise ValueError(f"shapes are (N, K), both at least 1; found {found or 'none'}")
    return found


def versions() -> dict[str, str | None]:
    """The versions of everything that affects the speed of a product."""
    return {"torch": torch.__version__, "cuda": torch.version.cuda} | {
        name: _version(name) for name in ("triton", "fp8gemm")
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and when a number was measured."""

    device: str
    name: str
    versions: Mapping[str, str | None]
    date: str

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        return f"{self.device} {self.name}, {self.date}, {versions}"


def setting_of(device: torch.device, name: str | None = None) -> Setting:
    """The setting of a device today; ``name`` replaces the device's own name."""
    return Setting(
        device=str(device),
        name=probe(device).name if name is None else name,
        versions=versions(),
        date=datetime.date.today().isoformat(),
    )
