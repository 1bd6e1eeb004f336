"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], *, right: int | None = None) -> list[str]:
    """Lines in which each column is as wide as its widest cell; columns from ``right`` on are aligned to the right.

    In a row with fewer cells than others, the last one may be longer than its column.

    Example:
        >>> columns([("layer", "MB"), ("a", "10.5"), ("2 layers in all",)], right=1)
        ['layer    MB', 'a      10.5', '2 layers in all']
    """
    most = max(map(len, rows), default=0)
    widths = [0] * most
    for row in rows:
        for column, cell in enumerate(row):
            if column < len(row) - 1 or len(row) == most:
                widths[column] = max(widths[column], len(cell))

    def aligned(column: int, cell: str) -> str:
        to_the_right = right is not None and column >= right
        return cell.rjust(widths[column]) if to_the_right else cell.ljust(widths[column])

    return ["  ".join(aligned(column, cell) for column, cell in enumerate(row)).rstrip() for row in rows]
