"""The report: which Linears and other matrices were converted, their memory, and which kernels ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from ..scaled import Precision
from .linear import FP8Linear
from .precision import ORIGINAL_KERNEL
from .sharding import held
from .structure import STACK_NAMES, stacks
from .weight import FP8Weight

COVERAGE = "_fp8gemm_coverage"  # attribute of a model: the coverage of its first forward pass
KEPT = "_fp8gemm_kept"  # attribute of a module: why each of its dense parameters was kept, by name


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The multiply-adds with parameters in one forward pass, by the name of the parameter.

    ``fp8`` ran on FP8, ``dense`` on dense weights, and ``dequantized`` on FP8 weights that were dequantized for it.
    Attention scores do not count, as they involve no parameter.

    Example:
        >>> str(Coverage(fp8={"a.weight": 990}, dense={"b.weight": 10}, dequantized={}))
        '99.00 % of 1000 multiply-adds on FP8, 1.00 % dense'
    """

    fp8: Mapping[str, int]
    dense: Mapping[str, int]
    dequantized: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(sum(table.values()) for table in (self.fp8, self.dense, self.dequantized))

    @property
    def share(self) -> float:
        """The share on FP8, from 0 to 1; 1 if there were no multiply-adds."""
        return sum(self.fp8.values()) / self.total if self.total else 1.0

    def of(self, parameter: str) -> float:
        """The share of one parameter in all multiply-adds, whatever they ran on."""
        count = sum(table.get(parameter, 0) for table in (self.fp8, self.dense, self.dequantized))
        return count / self.total if self.total else 0.0

    def __str__(self) -> str:
        parts = [f"{_percent(self.share)} of {self.total} multiply-adds on FP8"]
        for what, table in (("dense", self.dense), ("dequantized", self.dequantized)):
            if count := sum(table.values()):
                parts.append(f"{_percent(count / self.total)} {what}")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One weight: ``status`` is ``"fp8"`` or ``"kept"`` (with the ``reason``); bytes are those of the weight.

    ``bytes_after`` counts FP8 data, scales and a kept original. ``calls``, ``kernels`` and ``dequantizations`` count
    from patching on, in compiled graphs too, with the exceptions in docs/limits.md. ``ties`` lists other names of the
    same weight, for example the embedding of a tied output head. ``share`` is the weight's share, from 0 to 1, of all
    multiply-adds with parameters in the first forward pass after patching; None before that pass. ``precision`` is
    what ``set_precision`` has said last: ``"fp8"``, ``"weight_only"`` or ``"original"``. ``search`` says how
    ``FP8GemmOptions.weight_search`` found its scales and codes. ``saturated`` of ``checked`` activations were beyond
    its static range in ``count_saturation``.
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
    ties: tuple[str, ...] = ()
    share: float | None = None
    precision: Precision = "fp8"
    search: str = ""
    saturated: int = 0
    checked: int = 0


@dataclass(frozen=True)
class Report:
    """Every Linear of a model, converted or kept; ``str(report)`` is a table.

    Example:
        >>> from fp8gemm import enable_fp8_gemm
        >>> found = report(enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16), nn.ReLU())))
        >>> len(found.converted), found.bytes_before, found.bytes_after
        (1, 4096, 2176)
    """

    rows: tuple[Row, ...]
    coverage: Coverage | None = None

    def check(self, *, coverage: float = 0.99) -> None:
        """Checks that at least this share of the multiply-adds of the first forward pass ran on FP8.

        Raises:
            ValueError: the share is smaller; the message lists the dense and dequantized weights, the largest first,
            with
                the reasons. Or the whole model has not run yet.
        """
        found = self.coverage
        if found is None:
            raise ValueError("no forward pass was seen yet: run the patched model itself once, not compiled, first")
        if found.share >= coverage:
            return
        reasons = {key: row.reason for row in self.rows for key in (row.name, f"{row.name}.weight") if row.reason}
        slow = sorted([*found.dense.items(), *found.dequantized.items()], key=lambda item: -item[1])
        lines = [f"{found}; asked for {_percent(coverage)}"]
        for name, count in slow[:20]:
            what = "dequantized at each call" if name in found.dequantized else reasons.get(name, "dense")
            lines.append(f"  {name}: {_percent(count / found.total)}, {what}")
        raise ValueError("\n".join(lines))

    @property
    def converted(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "fp8")

    @property
    def kept(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "kept")

    @property
    def bytes_before(self) -> int:
        """Bytes of all these weights before patching."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The whole report in plain Python types."""
        rows = [{**asdict(row), "kernels": dict(row.kernels)} for row in self.rows]
        found = None if self.coverage is None else {**asdict(self.coverage), "share": self.coverage.share}
        return {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "coverage": found, "rows": rows}

    def __str__(self) -> str:
        header = ("layer", "weight", "runs on", "MB before", "after", "calls", "kernels", "dequantized")
        table = [header, *(_cells(row) for row in self.rows), self._total()]
        for title, text in _OPTIONAL.items():  # where there is something to say
            if any(cells := [text(row) for row in self.rows]):
                table = [(*line, cell) for line, cell in zip(table, (title, *cells, ""), strict=True)]
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        return "\n".join([*(line.rstrip() for line in lines), *([] if self.coverage is None else [str(self.coverage)])])

    def _total(self) -> tuple[str, ...]:
        name = f"{len(self.converted)} converted, {len(self.kept)} kept"
        calls = sum(row.calls for row in self.rows)
        dequantized = sum(row.dequantizations for row in self.rows)
        sizes = (_megabytes(self.bytes_before), _megabytes(self.bytes_after))
        return (name, "", "", *sizes, str(calls), "", str(dequantized))


def report(model: nn.Module) -> Report:
    """A table of every Linear of ``model`` and every other matrix that was seen: what became of it and what has run.

    Example:
        >>> from fp8gemm import enable_fp8_gemm
        >>> report(enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32)))).rows[0].shape
        (32, 64)
    """
    coverage: Coverage | None = model.__dict__.get(COVERAGE)
    rows = tuple(_rows(model))
    if coverage is not None:
        rows = tuple(replace(row, share=coverage.of(row.name) + coverage.of(f"{row.name}.weight")) for row in rows)
    return Report(rows, coverage)


def _rows(model: nn.Module) -> Iterator[Row]:
    modules = list(model.named_modules())
    patched = any(_weights(one) or KEPT in one.__dict__ or isinstance(one, FP8Linear) for _, one in modules)
    places: dict[int, list[tuple[str, nn.Module]]] = {}  # by home, so that a tied weight has one row
    for name, module in modules:
        for parameter, weight in _weights(module):
            places.setdefault(id(weight._home), []).append((_layer_name(name, parameter), module))
    for name, module in modules:
        for _, weight in _weights(module):
            if (found := places.pop(id(weight._home), None)) is not None:
                found.sort(key=lambda place: not isinstance(place[1], nn.Linear))  # an output head before its embedding
                yield _converted_row([place for place, _ in found], weight)
        reasons = module.__dict__.get(KEPT, {})
        for parameter, reason in reasons.items():
            if not isinstance(held(module._parameters.get(parameter)), FP8Weight):
                yield _kept_row(_layer_name(name, parameter), module, parameter, reason)
        if patched:
            yield from _later_rows(name, module, reasons)


def _layer_name(module: str, parameter: str) -> str:
    return module if parameter == "weight" else f"{module}.{parameter}".strip(".")


def _weights(module: nn.Module) -> list[tuple[str, FP8Weight]]:
    """A module's own FP8 weights; for distributed ones, the local shard."""
    parts = [(name, held(parameter)) for name, parameter in module._parameters.items()]
    return [(name, part) for name, part in parts if isinstance(part, FP8Weight)]


def _later_rows(name: str, module: nn.Module, known: Collection[str]) -> Iterator[Row]:
    """Dense Linears and stacks of experts that were added to the model after patching."""
    own = held(module._parameters.get("weight"))
    if isinstance(module, nn.Linear) and "weight" not in known and own is not None and not isinstance(own, FP8Weight):
        replaced = isinstance(module, FP8Linear)
        reason = "its weight was replaced by a dense one after patching" if replaced else "added after patching"
        yield _kept_row(name, module, "weight", reason)
    for stack in stacks(module):
        if stack in STACK_NAMES and stack not in known and not isinstance(held(module._parameters[stack]), FP8Weight):
            yield _kept_row(f"{name}.{stack}".strip("."), module, stack, "added after patching")


def _converted_row(names: list[str], weight: FP8Weight) -> Row:
    home, activity = weight._home, weight._home.activity
    return Row(
        name=names[0] or "(the model itself)",
        ties=tuple(names[1:]),
        status="fp8",
        shape=tuple(home.layout.shape),
        engine=home.engine or "",
        scheme=str(home.scheme),
        bytes_before=weight.numel() * weight.dtype.itemsize,
        bytes_after=home.nbytes,
        calls=activity.calls,
        kernels=tuple(Counter(activity.kernels).most_common()),
        dequantizations=activity.dequantizations,
        precision=home.precision,
        search="" if home.search is None else home.search.text,
        saturated=activity.saturated,
        checked=activity.checked,
    )


def _kept_row(name: str, module: nn.Module, parameter: str, reason: str) -> Row:
    matrix = module._parameters.get(parameter)
    if matrix is None or isinstance(matrix, nn.UninitializedParameter):
        matrix = getattr(module, parameter, None)  # computed at each access, as by weight_norm
    known = isinstance(matrix, torch.Tensor) and not isinstance(matrix, nn.UninitializedParameter)
    size = matrix.nbytes if matrix is not None and known else 0
    return Row(
        name=name or "(the model itself)",
        status="kept",
        shape=tuple(matrix.shape) if matrix is not None and known else (),
        reason=reason,
        bytes_before=size,
        bytes_after=size,
    )


def _cells(row: Row) -> tuple[str, ...]:
    engine = row.engine or "not materialized"
    at = {"fp8": engine, "weight_only": f"{engine}, weight-only", "original": ORIGINAL_KERNEL}
    runs_on = at[row.precision] if row.status == "fp8" else f"kept: {row.reason}"
    kernels = ", ".join(f"{name} x{count}" for name, count in row.kernels)
    shape = "x".join(str(size) for size in row.shape)
    calls, dequantized = (str(row.calls), str(row.dequantizations)) if row.status == "fp8" else ("", "")
    return (
        " = ".join((row.name, *row.ties)),
        shape,
        runs_on,
        _megabytes(row.bytes_before),
        _megabytes(row.bytes_after),
        calls,
        kernels,
        dequantized,
    )


def _saturation(row: Row) -> str:
    return f"{row.saturated} of {row.checked}" if row.checked else ""


_OPTIONAL: dict[str, Callable[[Row], str]] = {"weight search": lambda row: row.search, "saturated": _saturation}


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"
