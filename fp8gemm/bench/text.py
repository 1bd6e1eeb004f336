"""Formatting numbers in a table."""

from __future__ import annotations


def figures(*pairs: tuple[float | None, str]) -> str:
    """Numbers side by side, each in its format such as ``"10.1f"``; None becomes blanks of the same width."""
    return "".join(" " * int(form.split(".")[0]) if value is None else format(value, form) for value, form in pairs)
