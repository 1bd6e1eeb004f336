"""The report of a checkpoint, from the headers of its files: what is FP8, how large it is, and what is dense."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..text import columns
from ..weights.report import Report, Row
from .read import Checkpoint

_HALF = 2  # bytes of a weight in bfloat16


@dataclass(frozen=True)
class CheckpointReport(Report):
    """Every matrix of a checkpoint; ``bytes_before`` of those that are FP8 is what they take in bfloat16.

    Attributes:
        source: the folder or file.
        format: the checkpoint's format.
    """

    source: str = ""
    format: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "format": self.format, **super().to_dict()}

    @property
    def title(self) -> str:
        return f"{self.source}: {self.format}"

    @property
    def former(self) -> str:
        return "in bfloat16"

    def __str__(self) -> str:
        lines = [("layer", "weight", "MB in bfloat16", "on disk", "scheme")]
        lines += [
            (
                row.name,
                "x".join(map(str, row.shape)),
                f"{row.bytes_before / 1e6:.2f}",
                f"{row.bytes_after / 1e6:.2f}",
                row.scheme or f"dense: {row.reason}",
            )
            for row in self.rows
        ]
        total = f"{len(self.converted)} on FP8, {len(self.kept)} dense"
        lines.append((total, "", f"{self.bytes_before / 1e6:.2f}", f"{self.bytes_after / 1e6:.2f}", ""))
        return "\n".join([self.title, *columns(lines)])


def outline(checkpoint: Checkpoint) -> CheckpointReport:
    """The matrices of a checkpoint, FP8 or not; no weight is read.

    Raises:
        ValueError: it has no matrices.
    """
    rows = tuple(_rows(checkpoint))
    if not rows:
        raise ValueError(f"{checkpoint.source.path} has no matrices, only {len(checkpoint.contents.tensors)} tensors")
    return CheckpointReport(rows, source=str(checkpoint.source.path), format=checkpoint.format.name)


def _rows(checkpoint: Checkpoint) -> Iterator[Row]:
    layout, tensors = checkpoint.layout, checkpoint.contents.tensors
    for name in sorted({*layout.layers, *layout.plain, *layout.unsupported}, key=_natural):
        module = name.removesuffix(".weight")
        if name in layout.unsupported:
            yield Row(name=module, status="kept", shape=(), reason=f"cannot be read: {layout.unsupported[name]}")
        elif (layer := layout.layers.get(name)) is not None:
            yield Row(
                name=module,
                status="fp8",
                shape=tuple(layer.shape),
                scheme=str(layer.scheme),
                bytes_before=_HALF * math.prod(layer.shape),
                bytes_after=layer.nbytes,
            )
        elif len((tensor := tensors[layout.plain[name]]).shape) > 1 and tensor.dtype.is_floating_point:
            size = math.prod(tensor.shape) * tensor.dtype.itemsize
            reason = f"{str(tensor.dtype).removeprefix('torch.')} in the checkpoint"
            yield Row(
                name=module,
                status="kept",
                shape=tuple(tensor.shape),
                reason=reason,
                bytes_before=size,
                bytes_after=size,
            )


def _natural(name: str) -> list[tuple[int, str]]:
    """Block 10 comes after block 9."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in name.split(".")]
