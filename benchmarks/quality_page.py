"""The tables of docs/quality.md, made from what benchmarks/quality_models.py has saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "quality.md"
BEGIN, END = "<!-- written by benchmarks/quality_models.py -->", "<!-- end -->"
DTYPE = "bfloat16"  # the page shows the dtype that models run in; the file has what else was measured
# Title, and how the cell of a row is shown.
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "Distance to the unpatched model in float32, and that of the worst item, in %": lambda row: (
        f"{100 * row['error']:.2f} / {100 * row['worst']:.1f}"
    ),
    "The task's own measure: {score}": lambda row: number(row["score"]),
    "What is left of the unpatched model's answer: {agreement}": lambda row: number(row["agreement"]),
}

Rows = list[dict[str, Any]]
Key = tuple[str, str, str]


def number(value: float) -> str:
    return f"{value:#.4g}"


def key(row: dict[str, Any]) -> Key:
    return row["library"], row["scheme"], row["engine"]


def pivot(rows: Rows, models: list[str], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    """A table of Markdown with a column for each model; methods that ran with none of them are left out."""
    cells: dict[Key, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(key(row), {})[row["model"]] = cell(row) if "error" in row else "—"
    lines = [f"| library | scheme | engine | {' | '.join(models)} |", "|" + "---|" * (3 + len(models))]
    for names, found in cells.items():
        if set(found.values()) != {"—"}:
            lines.append("| " + " | ".join([*names, *(found.get(model, "—") for model in models)]) + " |")
    return lines


def refusals(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Why methods did not run: a line for each first reason, with the schemes and models that have it."""
    found: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for row in rows:
        if "error" not in row and "library" in row:
            name = " ".join([row["library"], row["engine"]]).strip()
            schemes, models = found.setdefault((name, row["reason"].split("; ")[0]), ({}, {}))
            schemes[row["scheme"]] = models[row["model"]] = None
    return [
        f"* {name} ({', '.join(schemes)}), {', '.join(models)}: {reason}"
        for (name, reason), (schemes, models) in found.items()
    ]


def tables(content: dict[str, Any]) -> str:
    """The part of the page that is written: the machine, the models, a table for each of ``TABLES``, the refusals."""
    names = [model["name"] for model in content["models"]]
    shown = [row for row in content["rows"] if row.get("dtype") == DTYPE]
    first = [row for row in content["rows"] if row.get("dtype") == "float32" and row["library"] == "unpatched"]
    versions = ", ".join(f"{name} {version}" for name, version in content["libraries"].items())
    lines = [f"Measured on {content['processor']}, {content['date']}, with torch {content['torch']}, {versions}.", ""]
    lines += ["| model | what it is | weights from | license | unpatched in float32 |", "|---|---|---|---|---|"]
    scores = {row["model"]: f"{number(row['score'])} ({score})" for row, score in _scored(first, content["models"])}
    for model in content["models"]:
        cells = (model["name"], model["kind"], model["package"], model["license"], scores.get(model["name"], "—"))
        lines.append(f"| {' | '.join(cells)} |")
    exceptions = [
        f"`{model['dense']}` of {model['name']}: {model['why']}." for model in content["models"] if model["dense"]
    ]
    lines += ["", *(f"Dense where there are exceptions: {exception}" for exception in exceptions)] if exceptions else []
    for title, cell in TABLES.items():
        measures = {kind: ", ".join(f"{m[kind]} ({m['name']})" for m in content["models"]) for kind in MEASURES}
        lines += ["", f"### {title.split(':')[0]}", ""]
        lines += [f"{measures[kind]}.\n" for kind in MEASURES if f"{{{kind}}}" in title]
        lines += pivot(shown, names, cell)
    if missing := refusals(shown):
        lines += ["", "### What did not run", "", *missing]
    return "\n".join(lines)


MEASURES = ("score", "agreement")


def _scored(rows: Rows, models: list[dict[str, str]]) -> list[tuple[dict[str, Any], str]]:
    measures = {model["name"]: model["score"] for model in models}
    return [(row, measures[row["model"]]) for row in rows]


def written(text: str, content: dict[str, Any]) -> str:
    """``text`` with the tables of ``content`` between the two marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables(content)}\n\n{END}{rest.split(END)[1]}"


def write(name: str, *, page: Path = PAGE, directory: Path = RESULTS) -> Path:
    """Writes the tables of benchmarks/results/NAME.json into the page."""
    page.write_text(written(page.read_text(), json.loads((directory / f"{name}.json").read_text())))
    return page
