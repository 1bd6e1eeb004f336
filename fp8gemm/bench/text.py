"""Figures in a table."""

from __future__ import annotations


def figures(*pairs: tuple[float | None, str]) -> str:
    """Numbers, each in its format such as ``"10.1f"``, one after the other; blanks of its width where there is none."""
    return "".join(" " * int(form.split(".")[0]) if value is None else format(value, form) for value, form in pairs)
