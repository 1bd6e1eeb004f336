"""What converting and quantizing a checkpoint report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import readable_size


@dataclass(frozen=True, kw_only=True)
class WriteReport:
    """What was written: the files, the size of all tensors before and after, the FP8 layers, and why others are dense.

    Example:
        >>> WriteReport(files=(), format="comfy", bytes_before=4, bytes_after=2, layers=("0",)).to_dict()["bytes_after"]
        2
    """

    files: tuple[Path, ...]
    format: str
    bytes_before: int
    bytes_after: int
    layers: tuple[str, ...]
    kept: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        return {**self.__dict__, "files": [str(path) for path in self.files], "kept": dict(self.kept)}

    def __str__(self) -> str:
        sizes = f"{readable_size(self.bytes_before)} -> {readable_size(self.bytes_after)}"
        lines = [f"{len(self.layers)} FP8 weights as {self.format}, {sizes}"]
        lines += [f"dense: {module} ({reason})" for module, reason in self.kept.items()]
        return "\n".join([*lines, *(f"wrote {path}" for path in self.files)])
