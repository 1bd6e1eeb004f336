"""The report: what became of every Linear, what it takes, and what really ran."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .holder import FP8Holder

KEPT = "_fp8gemm_kept"  # attribute of a module: reasons by the stack that was left as it is, "" for the module itself


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer: ``status`` is ``"fp8"`` or ``"kept"`` (with the ``reason``); bytes are those of its weight.

    ``bytes_after`` counts FP8 data, scales and a kept original. ``calls``, ``kernels`` and ``dequantizations`` are
    counted since patching, outside torch.compile.
    """

    name: str
    status: str
    shape: tuple[int, ...]
    reason: str = ""
    engine: str = ""
    scheme: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    calls: int = 0
    kernels: tuple[tuple[str, int], ...] = ()
    dequantizations: int = 0


@dataclass(frozen=True)
class Report:
    """Every Linear of a model, converted or kept; ``str`` of it is a table."""

    rows: tuple[Row, ...]

    @property
    def converted(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "fp8")

    @property
    def kept(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "kept")

    @property
    def bytes_before(self) -> int:
        """Of all these layers' weights, before patching."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        rows = [{**asdict(row), "kernels": dict(row.kernels)} for row in self.rows]
        return {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "rows": rows}

    def __str__(self) -> str:
        header = ("layer", "weight", "runs on", "MB before", "after", "calls", "kernels", "dequantized")
        table = [header, *(_cells(row) for row in self.rows), self._total()]
        widths = [max(len(line[column]) for line in table) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        return "\n".join(line.rstrip() for line in lines)

    def _total(self) -> tuple[str, ...]:
        name = f"{len(self.converted)} converted, {len(self.kept)} kept"
        calls = sum(row.calls for row in self.rows)
        dequantized = sum(row.dequantizations for row in self.rows)
        sizes = (_megabytes(self.bytes_before), _megabytes(self.bytes_after))
        return (name, "", "", *sizes, str(calls), "", str(dequantized))


def report(model: nn.Module) -> Report:
    """What became of every Linear of ``model`` and every other matrix that was seen, and what has run since."""
    return Report(tuple(_rows(model)))


def _rows(model: nn.Module) -> Iterator[Row]:
    for name, module in model.named_modules():
        if isinstance(module, FP8Holder):
            yield _converted_row(name, module)
        for stack, reason in module.__dict__.get(KEPT, {}).items():
            yield _kept_row(f"{name}.{stack}".strip(".") if stack else name, module, stack, reason)


def _converted_row(name: str, layer: FP8Holder) -> Row:
    original = layer.original_weight
    activity = layer.activity
    return Row(
        name=name or "(the model itself)",
        status="fp8",
        shape=layer.weight_shape,
        engine=layer.engine or "",
        scheme=str(layer.scheme),
        bytes_before=math.prod(layer.weight_shape) * layer.compute_dtype.itemsize,
        bytes_after=layer.fp8_nbytes + (0 if original is None else original.nbytes),
        calls=activity.calls,
        kernels=tuple(Counter(activity.kernels).most_common()),
        dequantizations=activity.dequantizations,
    )


def _kept_row(name: str, module: nn.Module, stack: str, reason: str) -> Row:
    """A layer's row counts its matrices, a stack's row that stack."""
    own = module._parameters
    matrices = [
        parameter
        for parameter in ([own.get(stack)] if stack else own.values())
        if parameter is not None
        and not isinstance(parameter, nn.UninitializedParameter)
        and (stack or parameter.dim() == 2)
    ]
    size = sum(matrix.nbytes for matrix in matrices)
    return Row(
        name=name or "(the model itself)",
        status="kept",
        shape=tuple(matrices[0].shape) if matrices else (),
        reason=reason,
        bytes_before=size,
        bytes_after=size,
    )


def _cells(row: Row) -> tuple[str, ...]:
    runs_on = row.engine or "not materialized" if row.status == "fp8" else f"kept: {row.reason}"
    kernels = ", ".join(f"{name} x{count}" for name, count in row.kernels)
    shape = "x".join(str(size) for size in row.shape)
    calls, dequantized = (str(row.calls), str(row.dequantizations)) if row.status == "fp8" else ("", "")
    return (
        row.name,
        shape,
        runs_on,
        _megabytes(row.bytes_before),
        _megabytes(row.bytes_after),
        calls,
        kernels,
        dequantized,
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"
