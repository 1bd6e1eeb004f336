"""What ``measure`` found, as an HTML page: a heat map of the model, depth by depth, and a table."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..pages import facts, heat_map, page, section, table

if TYPE_CHECKING:
    from .measurement import LayerError, Measurement

_OUTSIDE = "outside of blocks"
_COLUMNS = 12  # of a heat map that still fits a screen


def measurement_page(found: Measurement) -> str:
    """The page of a measurement, for ``Measurement.to_html``."""
    measured, output = found.worst(len(found.layers)), found.output
    top: dict[str, float] = {}
    if output.tokens:
        top = {"SQNR of the model's output": output.sqnr, "SQNR of its worst token": output.worst}
    if measured:
        top["SQNR of the worst layer"] = measured[0].sqnr
    shown = {name: f"{decibel_text(value)} dB".replace("exact dB", "exact") for name, value in top.items()}
    sections = [
        facts({**shown, "layers measured": str(len(measured))}),
        section("By depth", *_maps([layer for layer in found.layers if layer.measured])),
        section("Layers, worst first", *_rows(measured)),
    ]
    others = [(layer.name, layer.reason) for layer in found.layers if not layer.measured]
    others += list(found.kept.items())
    if others:
        sections.append(section("Not measured", table(("layer", "reason"), others)))
    return page("Output error of FP8 layers", *sections)


def _rows(measured: Sequence[LayerError]) -> list[str]:
    """The table, with how layers ran in a column only where that differs."""
    ran = [f"{layer.scheme} on {layer.engine}" for layer in measured]
    alike = len(set(ran)) == 1
    header = ("layer", "weight", "tokens", "SQNR dB", "p50", "p1", "worst", "outliers", "saturated")
    rows: list[list[str | float]] = [
        [
            " = ".join((layer.name, *layer.ties)),
            "x".join(map(str, layer.shape)),
            layer.tokens,
            *(decibel_text(value) for value in (layer.sqnr, layer.p50, layer.p1, layer.worst)),
            outliers_text(layer),
            saturated_text(layer),
            *([] if alike else [how]),
        ]
        for layer, how in zip(measured, ran, strict=True)
    ]
    drawn = table(header if alike else (*header, "ran"), rows)
    return [f"All of them: {ran[0]}.", drawn] if alike else [drawn]


def decibel_text(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}"


def outliers_text(layer: LayerError) -> str:
    channels, tokens = layer.outlier_channels, layer.outlier_tokens
    if channels is None:
        return "not seen"
    counts = ((len(channels), "channel"), (tokens or 0, "token"))
    return ", ".join(f"{count} {what}{'s' * (count > 1)}" for count, what in counts if count)


def saturated_text(layer: LayerError) -> str:
    shares = ((layer.saturated, ""), (layer.saturated_weights, " of the weights"))
    return ", ".join(f"{100 * share:.2g} %{of}" for share, of in shares if share)


def _maps(layers: Sequence[LayerError]) -> list[str]:
    """Heat maps of the SQNR and of the outlier channels; of the worst layer where several are in one cell."""
    parts = list(dict.fromkeys(_part(layer) for layer in _by_depth(layers)))
    column: Callable[[LayerError], str] = _part
    if len(parts) > _COLUMNS and any(layer.role for layer in layers):
        column = _role
    columns = list(dict.fromkeys(column(layer) for layer in _by_depth(layers)))
    rows = list(dict.fromkeys(_depth(layer) for layer in _by_depth(layers)))
    cells: dict[tuple[str, str], list[LayerError]] = {}
    for layer in layers:
        cells.setdefault((_depth(layer), column(layer)), []).append(layer)

    def values(of: Callable[[list[LayerError]], float]) -> list[list[float | None]]:
        return [[of(cells[row, name]) if (row, name) in cells else None for name in columns] for row in rows]

    def drawn(numbers: list[list[float | None]], caption: str, **more: Any) -> str:
        return heat_map(rows=rows, columns=columns, values=numbers, corner="depth", caption=caption, **more)

    error: dict[str, Any] = {"strong": "low", "text": decibel_text}
    least = values(lambda inside: min(layer.sqnr for layer in inside))
    median = values(lambda inside: min(layer.p50 for layer in inside))
    maps = [
        drawn(least, "SQNR of each layer's output in dB, all tokens together", **error),
        drawn(median, "SQNR of the median token in dB", **error),
    ]
    outliers = values(lambda inside: max(len(layer.outlier_channels or ()) for layer in inside))
    if any(value for line in outliers for value in line):
        maps.append(drawn(outliers, "Outlier channels among each layer's inputs"))
    return maps


def _by_depth(layers: Sequence[LayerError]) -> list[LayerError]:
    return sorted(layers, key=lambda layer: math.inf if layer.depth is None else layer.depth)


def _depth(layer: LayerError) -> str:
    return _OUTSIDE if layer.depth is None else str(layer.depth)


def _role(layer: LayerError) -> str:
    return layer.role or "other"


def _part(layer: LayerError) -> str:
    """What a layer is called within its block."""
    if layer.depth is None:
        return layer.name
    return re.split(r"(?:^|\.)\d+(?:\.|$)", layer.name, maxsplit=1)[1] or "the block"
