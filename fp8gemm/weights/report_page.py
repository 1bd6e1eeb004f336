"""The report as an HTML page: the tree of layers, heat maps over depth, what went wrong, and what was kept and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from ..pages import Node, facts, heat_map, nest, page, section, size, table, tree
from .ran import problems, times
from .rows import Row

_OUTSIDE = "outside of blocks"
_COLUMNS = 14  # of a heat map that still fits a screen
_LINES = 30  # of the tree that are unfolded at first


class LayerError(Protocol):
    """What ``measure`` finds of one layer; the figures are SQNR in dB, ``reason`` is why it was not measured."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def depth(self) -> int | None: ...
    @property
    def sqnr(self) -> float: ...
    @property
    def p50(self) -> float: ...
    @property
    def p1(self) -> float: ...
    @property
    def worst(self) -> float: ...
    @property
    def reason(self) -> str: ...


class Errors(Protocol):
    """What ``measure`` finds of a model."""

    @property
    def layers(self) -> Sequence[LayerError]: ...


def report_page(
    rows: Sequence[Row], share: float | None, errors: Errors | None, *, title: str, former: str = "before"
) -> str:
    """The page for ``rows``, with the ``share`` of multiply-adds on FP8 if that is known.

    ``former`` says what ``bytes_before`` are.

    Raises:
        ValueError: ``errors`` has no layer of ``rows``.
    """
    found = _errors_of(rows, errors)
    wrong = problems(rows, False) if any(row.last for row in rows) else {}
    sections: list[str] = [facts(_top(rows, share, wrong, former))]
    if wrong:
        sections.append(section("Not on FP8 in the last forward pass", table(("layer", "what"), wrong.items())))
    sections += _maps(rows, found)
    nodes = _nodes(rows)
    sections.append(section("Layers", tree(nodes, open_levels=_open(nodes))))
    kept = [row for row in rows if row.status == "kept"]
    if kept:
        lines = [(_names(row), _shape(row), size(row.bytes_after), row.reason) for row in kept]
        sections.append(section("Kept dense, and why", table(("layer", "weight", "size", "why"), lines)))
    if len(kept) < len(rows):
        sections.append(section("On FP8", _converted([row for row in rows if row.status == "fp8"], found, former)))
    return page(title, *sections)


def _errors_of(rows: Sequence[Row], errors: Errors | None) -> dict[str, LayerError]:
    if errors is None:
        return {}
    names = {row.name for row in rows}
    found = {layer.name: layer for layer in errors.layers if layer.name in names}
    if not found:
        others = ", ".join(layer.name for layer in errors.layers[:3]) or "none"
        raise ValueError(f"errors are of other layers ({others}) than the report ({', '.join(sorted(names)[:3])})")
    return found


def _top(rows: Sequence[Row], share: float | None, wrong: dict[str, str], former: str) -> dict[str, str]:
    converted = [row for row in rows if row.status == "fp8"]
    before, after = (sum(getattr(row, name) for row in rows) for name in ("bytes_before", "bytes_after"))
    top = {"weights on FP8": f"{len(converted)} of {len(rows)}", "size": f"{size(after)}, {former} {size(before)}"}
    if share is not None:
        top["multiply-adds on FP8"] = f"{100 * share:.2f} %"
    if engines := Counter(row.engine for row in converted if row.engine):
        top["engine" if len(engines) == 1 else "engines"] = ", ".join(name for name, _ in engines.most_common())
    if any(row.last for row in rows):
        some = f"{len(wrong)} {'layer' if len(wrong) == 1 else 'layers'} not on FP8"
        top["last forward pass"] = some if wrong else "all layers on FP8"
    return top


def _nodes(rows: Sequence[Row]) -> tuple[Node, ...]:
    return nest((row.name, row.bytes_after, _note(row)) for row in rows)


def _open(nodes: Iterable[Node]) -> int:
    """How many levels of the tree to unfold."""
    level, count, depth = list(nodes), 0, 0
    while level:
        count += len(level)
        if count > _LINES:
            break
        level, depth = [child for node in level for child in node.children], depth + 1
    return max(depth - 1, 0)


def _note(row: Row) -> str:
    if row.status != "fp8":
        return f"{_shape(row)}, kept: {row.reason}"
    parts = [_shape(row), "FP8", row.engine, f"called {times(row.calls)}" if row.calls else ""]
    parts.append(f"dequantized {times(row.dequantizations)}" if row.dequantizations else "")
    parts += [f"= {tie}" for tie in row.ties]
    return ", ".join(part for part in parts if part)


def _maps(rows: Sequence[Row], found: dict[str, LayerError]) -> list[str]:
    """Heat maps over depth; of the smallest value where several layers share a cell, or the sum of sizes."""
    if found:
        measured = [found[row.name] for row in rows if row.status == "fp8" and row.name in found]
        measured = [layer for layer in measured if not layer.reason]
        where = _placed([(layer.name, layer.depth, layer.role) for layer in measured])
        of = {
            "sqnr": "SQNR of each layer's output in dB, all tokens together",
            "worst": "SQNR of the worst token in dB",
        }
        maps = [
            _map(where, [(layer.name, getattr(layer, figure)) for layer in measured], _least, caption, decibels=True)
            for figure, caption in of.items()
        ]
        return [section("Errors by depth", *maps)] if measured else []
    where = _placed([(row.name, _depth(row.name), "") for row in rows])
    if len({depth for depth, _ in where.values()}) < 2:
        return []
    sizes = [(row.name, float(row.bytes_after)) for row in rows]
    return [section("Sizes by depth", _map(where, sizes, sum, "Bytes of the weights as they are now"))]


def _map(
    where: dict[str, tuple[str, str]],
    values: Sequence[tuple[str, float]],
    combine: Callable[[list[float]], float],
    caption: str,
    *,
    decibels: bool = False,
) -> str:
    cells: dict[tuple[str, str], list[float]] = {}
    for name, value in values:
        cells.setdefault(where[name], []).append(value)
    depths = list(dict.fromkeys(depth for depth, _ in where.values()))
    parts = list(dict.fromkeys(part for _, part in where.values()))
    grid = [[combine(cells[at]) if (at := (depth, part)) in cells else None for part in parts] for depth in depths]
    return heat_map(
        rows=depths,
        columns=parts,
        values=grid,
        corner="depth",
        caption=caption,
        strong="low" if decibels else "high",
        text=_decibels if decibels else size,
    )


def _placed(layers: Sequence[tuple[str, int | None, str]]) -> dict[str, tuple[str, str]]:
    """The row and the column of each layer, from its name, depth and role; in the order of depths.

    Columns are what layers are called within their blocks or, if these are too many, their roles; without roles the
    first words of these names.
    """
    ordered = sorted(layers, key=lambda layer: math.inf if layer[1] is None else layer[1])
    inner = {name: _part(name) for name, _, _ in ordered}
    if len(set(inner.values())) > _COLUMNS:
        roles = {name: role for name, _, role in ordered if role}
        inner = {name: roles.get(name) or part.split(".")[0] for name, part in inner.items()}
    return {name: (_OUTSIDE if depth is None else str(depth), inner[name]) for name, depth, _ in ordered}


def _depth(name: str) -> int | None:
    """The number of a layer's block: the first number in its name."""
    return next((int(word) for word in name.split(".") if word.isdecimal()), None)


def _part(name: str) -> str:
    """What a layer is called within its block, with ``*`` for further numbers."""
    words = name.split(".")
    start = next((at + 1 for at, word in enumerate(words) if word.isdecimal()), 0)
    return ".".join("*" if word.isdecimal() else word for word in words[start:]) or "the block"


def _converted(rows: Sequence[Row], found: dict[str, LayerError], former: str) -> str:
    ran = any(row.calls or row.dequantizations for row in rows)
    shares = any(row.share is not None for row in rows)
    columns: dict[str, Callable[[Row], str | float | None]] = {
        "layer": _names,
        "weight": _shape,
        "scheme": lambda row: row.scheme,
        "size": lambda row: size(row.bytes_after),
        former: lambda row: size(row.bytes_before),
    }
    if any(row.engine for row in rows):
        columns["engine"] = lambda row: row.engine or "not materialized"
    if ran:
        columns["calls"] = lambda row: row.calls
        columns["kernels"] = lambda row: ", ".join(f"{name} x{count}" for name, count in row.kernels)
        columns["dequantized"] = lambda row: row.dequantizations
    if shares:
        columns["multiply-adds"] = lambda row: "" if row.share is None else f"{100 * row.share:.2f} %"
    if found:
        for header, name in (("SQNR dB", "sqnr"), ("p50", "p50"), ("p1", "p1"), ("worst", "worst")):
            columns[header] = _figure(found, name)
    return table(tuple(columns), [[cell(row) for cell in columns.values()] for row in rows])


def _figure(found: dict[str, LayerError], name: str) -> Callable[[Row], str]:
    return lambda row: _decibels(getattr(found[row.name], name)) if row.name in found else ""


def _least(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else min(values)


def _decibels(value: float) -> str:
    return "NaN" if math.isnan(value) else "exact" if value == math.inf else f"{value:.1f}"


def _names(row: Row) -> str:
    return " = ".join((row.name, *row.ties))


def _shape(row: Row) -> str:
    return "x".join(map(str, row.shape))
