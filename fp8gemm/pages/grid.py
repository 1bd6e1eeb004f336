"""A heat map as a table of coloured cells, each with its value as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from .markup import Html, breakable, element
from .numbers import number
from .style import STEPS
from .tables import scrolled


def heat_map(
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    corner: str = "",
    caption: str = "",
    strong: Literal["high", "low"] = "high",
    text: Callable[[float], str] = number,
) -> Html:
    """Cells coloured by their values between the smallest and the largest; ``values[i][j]`` is of row i, column j.

    A cell of None is dashed and empty; NaN is hatched, infinities get the outermost colour. The strong end of the
    colours, dark on a light page and bright on a dark one, is that of the ``strong`` values.

    Raises:
        ValueError: ``values`` does not have a value for each row and column.

    Example:
        >>> drawn = heat_map(rows=["0", "1"], columns=["mlp"], values=[[1.0], [None]])
        >>> 'class="none"' in drawn
        True
    """
    if len(values) != len(rows) or any(len(line) != len(columns) for line in values):
        found = f"{len(values)} x {sorted({len(line) for line in values})}"
        raise ValueError(f"values are {found}, expected {len(rows)} rows of {len(columns)} columns")
    present = [value for line in values for value in line if value is not None]
    finite = [value for value in present if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)

    def cell(value: float | None) -> Html:
        if value is None:
            return element("td", class_="none")
        return element("td", text(value), class_=_step(value, low, high, strong))

    head = [element("th", breakable(name), scope="col") for name in (corner, *columns)]
    lines = [
        element("tr", element("th", name, scope="row"), *map(cell, line))
        for name, line in zip(rows, values, strict=True)
    ]
    drawn = element("table", element("thead", element("tr", *head)), element("tbody", *lines), class_="heat")
    missing = any(value is None for line in values for value in line)
    legend = _legend(present, (low, high) if finite else None, strong, text, missing=missing)
    under = [element("figcaption", caption)] if caption else []
    return element("figure", scrolled(drawn, caption or "heat map"), legend, *under)


def _step(value: float, low: float, high: float, strong: str) -> str:
    """The class of a value: one of the steps of the colour scale, or that of NaN."""
    if math.isnan(value):
        return "nan"
    last = len(STEPS) - 1
    if math.isinf(value):
        step = last if value > 0 else 0
    else:
        step = last // 2 if low == high else min(int((value / 2 - low / 2) / (high / 2 - low / 2) * len(STEPS)), last)
    return f"s{step if strong == 'high' else last - step}"


def _legend(
    present: Sequence[float],
    ends: tuple[float, float] | None,
    strong: str,
    text: Callable[[float], str],
    *,
    missing: bool,
) -> Html:
    parts: list[Html] = []
    if ends:
        order = range(len(STEPS)) if strong == "high" else reversed(range(len(STEPS)))
        scale = element("span", *(element("span", "", class_=f"s{index}") for index in order), class_="scale")
        parts += [element("span", text(ends[0])), scale, element("span", text(ends[1]))]
    if any(math.isnan(value) for value in present):
        parts.append(element("span", "NaN", class_="key nan"))
    if missing:
        parts.append(element("span", "no value", class_="key none"))
    return element("div", *parts, class_="legend")
