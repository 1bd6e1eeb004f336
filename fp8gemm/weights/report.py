"""The report: which Linears and other matrices were converted, their memory, and which kernels ran."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..text import columns
from .activity import ORIGINAL_KERNEL
from .passes import unwrapped
from .ran import failure, problems
from .report_page import Errors, report_page
from .rows import KEPT, Row, rows

__all__ = ["COVERAGE", "KEPT", "Coverage", "Report", "Row", "report"]

COVERAGE = "_fp8gemm_coverage"  # attribute of a model: the coverage of its first forward pass
_UNSEEN = (
    "no forward pass was seen yet: run the patched model itself once, not compiled, first; for compiled models use "
    "fp8gemm.strict(model), and for loaded ones, whose multiply-adds are not counted, check(coverage=None)"
)


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

    def check(self, *, coverage: float | None = 0.99, allow_uncalled: bool | str | Sequence[str] = False) -> None:
        """Checks that every converted layer ran on FP8 in the last forward pass, and that at least the share
        ``coverage`` of the multiply-adds of the first one did.

        The last pass is the last one that has returned and was not compiled; ``strict`` sees compiled ones too. A layer
        that also was dequantized passes, unlike in ``strict``.

        Args:
            coverage: from 0 to 1; None does not check it, for models whose first pass was not observed.
            allow_uncalled: the layers that need not be called, such as experts without tokens: True for all, or one or
                more glob patterns over their names.

        Raises:
            ValueError: a layer was not called, was dequantized instead, multiplied by a kept original, or its weight
                was replaced; or the share is smaller. The message names all of these, and the dense and dequantized
                weights, the largest first, with the reasons. Or the whole model has not run yet, or a pattern matches
                no layer.

        Example:
            >>> from fp8gemm import enable_fp8_gemm
            >>> model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32)))
            >>> y = model(torch.randn(2, 64))
            >>> report(model).check()
            >>> model[0].forward = nn.Identity()
            >>> y = model(torch.randn(2, 64))
            >>> report(model).check(coverage=None)
            Traceback (most recent call last):
            ...
            ValueError: 1 of 1 converted layers did not run on FP8 in the last forward pass:
              0: not called: its forward was replaced on the object
            layers that need not be called, such as experts without tokens: allow_uncalled=True or patterns
        """
        unseen = bool(self.converted) and all(row.last is None for row in self.converted)
        if unseen or (self.coverage is None and coverage is not None):
            raise ValueError(_UNSEEN)
        if wrong := problems(self.rows, allow_uncalled):
            raise ValueError(failure(self.rows, wrong, "in the last forward pass"))
        if coverage is not None and self.coverage is not None:
            self._check_coverage(self.coverage, coverage)

    def _check_coverage(self, found: Coverage, wanted: float) -> None:
        if found.share >= wanted:
            return
        reasons = {key: row.reason for row in self.rows for key in (row.name, f"{row.name}.weight") if row.reason}
        slow = sorted([*found.dense.items(), *found.dequantized.items()], key=lambda item: -item[1])
        lines = [f"{found}; asked for {_percent(wanted)}"]
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

    @property
    def title(self) -> str:
        """The title of the page."""
        return "FP8 report"

    @property
    def former(self) -> str:
        """What ``bytes_before`` are, on the page."""
        return "before"

    def to_dict(self) -> dict[str, Any]:
        """The whole report in plain Python types."""
        rows = [{**asdict(row), "kernels": dict(row.kernels)} for row in self.rows]
        found = None if self.coverage is None else {**asdict(self.coverage), "share": self.coverage.share}
        return {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "coverage": found, "rows": rows}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """``to_dict`` as JSON text, which is also written to ``path`` if that is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_html(self, path: str | os.PathLike[str] | None = None, errors: Errors | None = None) -> str:
        """One self-contained page, which is also written to ``path`` if that is given.

        It shows the tree of layers with their sizes, engines and calls, a heat map over the depth of the model, what
        did not run on FP8 in the last forward pass, and what was kept and why.

        Args:
            errors: what ``measure`` found for the same layers, for heat maps of the errors; otherwise the map shows
                the sizes of the weights.

        Raises:
            ValueError: ``errors`` has no layer of this report.

        Example:
            >>> from fp8gemm import enable_fp8_gemm
            >>> report(enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32)))).to_html().startswith("<!DOCTYPE html>")
            True
        """
        share = None if self.coverage is None else self.coverage.share
        text = report_page(self.rows, share, errors, title=self.title, former=self.former)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        header = ("layer", "weight", "runs on", "MB before", "after", "calls", "kernels", "dequantized")
        table = [header, *(_cells(row) for row in self.rows), self._total()]
        for title, text in _OPTIONAL.items():  # where there is something to say
            if any(cells := [text(row) for row in self.rows]):
                table = [(*line, cell) for line, cell in zip(table, (title, *cells, ""), strict=True)]
        return "\n".join([*columns(table), *([] if self.coverage is None else [str(self.coverage)])])

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
    model = unwrapped(model)
    coverage: Coverage | None = model.__dict__.get(COVERAGE)
    found = tuple(rows(model))
    if coverage is not None:
        found = tuple(replace(row, share=coverage.of(row.name) + coverage.of(f"{row.name}.weight")) for row in found)
    return Report(found, coverage)


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
