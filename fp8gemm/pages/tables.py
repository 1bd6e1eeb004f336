"""Tables, and bars as a table with one column drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from .markup import Html, breakable, element
from .numbers import number

Cell = str | float | None
_SHORT = 14  # letters of a cell that is kept on one line


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]], *, caption: str = "") -> Html:
    """A table whose first column names the row; a column of numbers is aligned to the right, None is left empty.

    Raises:
        ValueError: a row does not have a cell for each column.

    Example:
        >>> table(["layer", "calls"], [["a", 3]]).count("<td")
        1
    """
    body = [list(row) for row in rows]
    for row in body:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, expected {len(header)}, one for each of {list(header)}")
    kinds = [_kind([row[column] for row in body]) for column in range(len(header))]
    head = [element("th", name, scope="col", class_=kind) for name, kind in zip(header, kinds, strict=True)]
    lines = [element("tr", *map(_cell, range(len(row)), row, kinds)) for row in body]
    return scrolled(
        element("table", element("thead", element("tr", *head)), element("tbody", *lines)), caption or "table"
    )


def bars(values: Mapping[str, float], *, text: Callable[[float], str] = number, caption: str = "") -> Html:
    """A horizontal bar for each value, with its name and the value as text.

    Raises:
        ValueError: a value is negative.

    Example:
        >>> 'width="50%"' in bars({"a": 1.0, "b": 2.0})
        True
    """
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"the bar of {name!r} is {value}, expected at least 0")
    most = max((value for value in values.values() if math.isfinite(value)), default=0.0) or 1.0
    lines = [
        element(
            "tr",
            element("th", breakable(name), scope="row"),
            element("td", _bar(value / most), class_="bar"),
            element("td", text(value), class_="number"),
        )
        for name, value in values.items()
    ]
    return scrolled(element("table", element("tbody", *lines), class_="bars"), caption or "bars")


def scrolled(content: Html, label: str) -> Html:
    """A box that scrolls sideways by itself, also by the keyboard, so that the page never does."""
    return element("div", content, class_="scroll", tabindex="0", role="region", aria_label=label)


def _bar(share: float) -> Html:
    width = 0.0 if math.isnan(share) else min(share, 1.0)
    return element("svg", element("rect", width=f"{100 * width:.6g}%", height="100%"), aria_hidden="true")


def _kind(cells: Sequence[Cell]) -> str | None:
    """The class of a column: of numbers, of short texts that are not broken into lines, or neither."""
    present = [cell for cell in cells if cell is not None]
    if present and not any(isinstance(cell, str) for cell in present):
        return "number"
    return "short" if all(isinstance(cell, str) and len(cell) <= _SHORT for cell in present) else None


def _cell(column: int, value: Cell, kind: str | None) -> Html:
    text = "" if value is None else value if isinstance(value, str) else number(value)
    return element("td", text, class_=kind) if column else element("th", breakable(text), class_=kind, scope="row")
