"""What ``bench`` and ``tune`` found, as text, and whether that is a failure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def tell(facts: Mapping[str, Any]) -> str:
    """The facts of either as a table."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    lines = [f"{facts['device']} {facts['name']}, {facts['date']}, {versions}"]
    if "table" in facts:
        return "\n".join([*lines, *_tell_tuned(facts)])
    lines.append(f"{facts['scheme']}, {facts['dtype']}; error: against the float32 product of the same operands")
    lines.append(f"{'N x K':>15} {'M':>6}  {'engine':<16}{'us':>10}{'x bf16':>8}{'error':>9}")
    for row in facts["rows"]:
        product = f"{row['n']} x {row['k']}"
        name = f"{row['name']} (auto)" if row["auto"] else row["name"]
        numbers = _numbers(row, microseconds="10.1f", x_bf16="8.2f", error="9.1e")
        lines.append(f"{product:>15} {row['m']:>6}  {name:<16}{numbers}  {row['note']}".rstrip())
    return "\n".join(lines)


def _tell_tuned(facts: Mapping[str, Any]) -> list[str]:
    lines = [f"{'kind':<7}{'N x K':>15} {'M':>6}{'us':>10}{'formula':>10}{'bf16':>10}  plan"]
    for row in facts["rows"]:
        numbers = _numbers(row, microseconds="10.1f", formula_microseconds="10.1f", bf16_microseconds="10.1f")
        product = f"{row['n']} x {row['k']}"
        plan = row["plan"] or "none ran"
        same = " (the formula's)" if plan == row["formula"] else ""
        lines.append(f"{row['kind']:<7}{product:>15} {row['m']:>6}{numbers}  {plan}{same}, of {row['candidates']}")
        lines += [f"    dropped: {dropped}: {note}" for dropped, note in row["dropped"].items()]
    lines += [f"left out: {problem}: {reason}" for problem, reason in facts["left_out"].items()]
    return [*lines, f"wrote {facts['table']}"]


def _numbers(row: Mapping[str, Any], **formats: str) -> str:
    """Fields of a row in columns, empty where there is no number."""
    width = {name: int(form.split(".")[0]) for name, form in formats.items()}
    return "".join(
        " " * width[name] if row[name] is None else format(row[name], form) for name, form in formats.items()
    )


def failed(facts: Mapping[str, Any]) -> bool:
    """Whether a cell got no plan, or nothing but bfloat16 could be timed, or something was wrong."""
    if "table" in facts:
        return any(row["plan"] is None for row in facts["rows"])
    timed = [row for row in facts["rows"] if row["microseconds"] is not None and row["name"] != "bf16"]
    return not timed or any(row["note"].startswith("wrong") for row in facts["rows"])
