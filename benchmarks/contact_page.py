"""The page of text that benchmarks/first_contact.py makes of its record, which it can be made of again:

python benchmarks/contact_page.py benchmarks/results/first_contact.json
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contact_journal import NO_GPU, NOT_REACHED, OK, REFUSED, Row
from gpu_goals import AUTO, Cell, cells, goals, model_goals, summary
from harness import table

from fp8gemm.engines.table import AUTO as ORDER
from fp8gemm.engines.triton.tune import WORTH_IT

MOST = 25  # lines of a list
FEW = 64  # tokens: the engines are ranked for at most so many, and for more


def page(record: dict[str, Any]) -> str:
    """The record in a page: what went wrong first, then what was found, then what should be set differently."""
    steps: dict[str, Row] = record["steps"]
    measured = [row for name in ("table", "grouped") for found in found_in(steps, name) for row in found["measured"]]
    whole = [row for found in found_in(steps, "models") for row in found["measured"]]
    parts = {
        "": header(record),
        "what went wrong": troubles(steps),
        "refused": refusals(steps),
        "checks, and their seconds": checks(steps),
        "tests": tests(steps),
        "probes": probed(steps),
        "not timed": untimed(measured + whole),
        "goals": [summary(goals(measured) + model_goals(whole))] if measured or whole else [],
        "host time of a call, us": hosts(steps),
        "engines: times relative to the fastest one": ranks(measured),
        "where another engine is at least 3 % faster than auto": beaten(measured),
        "paths of the Triton engine": switches(steps),
        "plans that failed, or are at least 3 % faster than the formula's": better_plans(steps),
        "rates that the formula assumes": rates(steps),
    }
    return "\n".join(line for title, lines in parts.items() if lines for line in ("", title.upper(), *lines)).strip()


def header(record: dict[str, Any]) -> list[str]:
    steps: dict[str, Row] = record["steps"]
    places = dict.fromkeys(str_of(entry["place"]) for entry in steps.values() if entry["place"])
    rows = []
    for entry in steps.values():
        counts = Counter(row["status"] for row in entry["rows"])
        rows.append(
            {
                "step": entry["step"],
                "status": entry["status"],
                "s": entry["seconds"],
                "rows": ", ".join(f"{count} {status}" for status, count in counts.items()),
                "note": entry["note"],
            }
        )
    without = [entry["step"] for entry in steps.values() if entry["status"] == NO_GPU]
    said = [f"no GPU: {len(without)} of {len(steps)} steps had nothing to run on"] if without else []
    return [f"first contact, {record['date']}", *places, *said, table(rows, ["step", "status", "s", "rows", "note"])]


def str_of(place: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in place.items() if value is not None)


def found_in(steps: dict[str, Row], name: str, start: str = "") -> Iterator[Row]:
    """The findings of a step's rows whose names start so."""
    for row in steps.get(name, {}).get("rows", ()):
        if row.get("found") and row["row"].startswith(start):
            yield row["found"]


def troubles(steps: dict[str, Row]) -> list[str]:
    """All rows that failed, by step."""
    lines = []
    for entry in steps.values():
        bad = [row for row in entry["rows"] if row["status"] not in (OK, REFUSED, NOT_REACHED)]
        lines += [f"{entry['step']}: {row['row']}: {row['status']}: {row.get('note', '')}" for row in bad[:MOST]]
        lines += [f"    {line}" for row in bad for line in row.get("sanitizer", ())][:MOST]
        lines += [f"    {test['test']}: {test['outcome']}: {test['why'][:150]}" for test in tests_in(bad)][:MOST]
        lines += [f"{entry['step']}: {len(bad) - MOST} more"] if len(bad) > MOST else []
        if entry["status"] not in (OK, NO_GPU) and not entry["rows"] and entry.get("output"):
            lines += [f"    {line}" for line in entry["output"].splitlines()[-8:]]
    return lines


def tests_in(rows: list[Row]) -> list[Row]:
    return [test for row in rows for test in row.get("found", {}).get("tests", ())]


def refusals(steps: dict[str, Row]) -> list[str]:
    """What engines and torch do not take here, and why."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for row in (row for name in ("versions", "checks", "probes") for row in steps.get(name, {}).get("rows", ())):
        if row["status"] == REFUSED:
            by_reason[row["note"]].append(row["row"])
    return [f"{reason}: {', '.join(names)}" for reason, names in by_reason.items()]


def checks(steps: dict[str, Row]) -> list[str]:
    rows = [row for row in steps.get("checks", {}).get("rows", ()) if row["status"] == OK]
    return [", ".join(f"{row['row']} {row['seconds']:.1f}" for row in rows)] if rows else []


def tests(steps: dict[str, Row]) -> list[str]:
    rows = [row for row in steps.get("tests", {}).get("rows", ()) if "counts" in row.get("found", {})]
    return [f"{row['row']}: {', '.join(f'{n} {what}' for what, n in row['found']['counts'].items())}" for row in rows]


def probed(steps: dict[str, Row]) -> list[str]:
    rows = [row for row in steps.get("probes", {}).get("rows", ()) if row["status"] == OK and row["row"] != "rates"]
    return [
        f"{row['row']}: {', '.join(f'{name} {short(value)}' for name, value in row['found'].items())}" for row in rows
    ]


def short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {short(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(short, value))
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def untimed(measured: list[Row]) -> list[str]:
    """Why candidates were not timed, and how often."""
    notes = Counter((row["name"], row.get("note", "")) for row in measured if not row.keys() & {"graph us", "ms"})
    return [f"{name}, {count} times: {note}" for (name, note), count in sorted(notes.items())]


def hosts(steps: dict[str, Row]) -> list[str]:
    rows = [row for row in steps.get("variants", {}).get("rows", ()) if row["row"].startswith("host ")]
    timed = [{"product": row["row"][5:], **row["found"]["us"]} for row in rows if row.get("found")]
    return [table(timed, list(timed[0]))] if timed else []


def ranks(measured: list[Row]) -> list[str]:
    """Each engine's time by that of the fastest, as geometric means, and the order in which auto would try them."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells(measured):
        groups[f"{cell.case.kind}, M {'<=' if cell.case.m <= FEW else '>'} {FEW}"].append(cell)
    lines = []
    for name, group in groups.items():
        means = slowness(group)
        if len(means) < 2:
            continue
        asked = [engine for engine in ORDER["cuda"] if engine in means]
        best = [engine for engine in means if engine in asked]
        verdict = "as auto tries them" if best == asked else f"auto tries {', '.join(asked)}"
        figures = ", ".join(f"{engine} {mean:.2f}" for engine, mean in means.items())
        lines.append(f"{name}: {figures} ({len(group)} products): {verdict}")
    return lines


def slowness(group: Iterable[Cell]) -> dict[str, float]:
    """By engine, the geometric mean of its time by the fastest engine's, the fastest engine first."""
    logs: dict[str, list[float]] = defaultdict(list)
    for cell in group:
        times = own_times(cell)
        for engine, time in times.items():
            logs[engine].append(math.log(time / min(times.values())))
    means = {engine: math.exp(sum(each) / len(each)) for engine, each in logs.items()}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def own_times(cell: Cell) -> dict[str, float]:
    """The times of fp8gemm's engines alone."""
    own = {name: us for name, us in cell.graph.items() if name.startswith("fp8gemm ") and name != AUTO}
    return {name.removeprefix("fp8gemm "): us for name, us in own.items()}


def beaten(measured: list[Row]) -> list[str]:
    lines = []
    for cell in cells(measured):
        times, auto = own_times(cell), cell.graph.get(AUTO)
        best = min(times, key=times.__getitem__, default="")
        if auto is not None and best and times[best] < WORTH_IT * auto:
            lines.append((times[best] / auto, f"{cell}: {best} {times[best]:.1f} us, auto {auto:.1f} us"))
    return [line for _, line in sorted(lines)[:MOST]]


@dataclass(frozen=True)
class Switch:
    """A choice between paths that the formula makes by M: ``few`` for fewer tokens, ``many`` for more."""

    what: str
    kind: str
    few: tuple[str, ...]
    many: tuple[str, ...]


SWITCHES = (
    Switch("one token in a kernel of its own", "row", ("vectors",), ("tokens",)),
    Switch("activations as they are, or in FP8", "row", ("vectors", "tokens"), ("rows", "library")),
    Switch("our product, or torch's", "row", ("rows",), ("library",)),
    Switch("our product, or torch's", "block", ("blocks",), ("library",)),
    Switch("decoded in the product, or before it", "weight", ("tokens",), ("dense",)),
)


def switches(steps: dict[str, Row]) -> list[str]:
    """For each switch and shape, where it was measured to change over, and where the formula does."""
    by_shape: dict[tuple[str, int, int], list[Row]] = defaultdict(list)
    for found in found_in(steps, "variants", "paths "):
        by_shape[found["kind"], found["n"], found["k"]].append(found)
    lines = []
    for (kind, n, k), cells_ in by_shape.items():
        for switch in SWITCHES:
            if switch.kind == kind and (line := switched(switch, cells_)):
                lines.append({"kind": kind, "shape": f"{n} x {k}", "choice": switch.what, **line})
    return [table(lines, ["kind", "shape", "choice", "faster", "formula", "verdict"])] if lines else []


def switched(switch: Switch, found: list[Row]) -> Row | None:
    """Where the first paths are faster, where the formula takes them; None if they never ran side by side."""
    faster: dict[int, bool] = {}
    formula: dict[int, bool] = {}
    for cell in found:
        times = {plan["path"]: plan["us"] for plan in cell["plans"] if plan["us"] is not None}
        few, many = (
            min((times[path] for path in paths if path in times), default=None) for paths in (switch.few, switch.many)
        )
        if few is None or many is None:
            continue
        faster[cell["m"]] = few <= many
        chosen = cell["formula"].split()[0].rstrip(",")
        if chosen in (*switch.few, *switch.many):
            # A difference that is not worth a change is none.
            near = min(few, many) > WORTH_IT * max(few, many)
            formula[cell["m"]] = faster[cell["m"]] if near else chosen in switch.few
    if not faster:
        return None
    wrong = [m for m, took in formula.items() if took != faster[m]]
    names = "/".join(switch.few), "/".join(switch.many)
    verdict = f"differs at M = {', '.join(map(str, wrong))}" if wrong else "as measured"
    return {"faster": in_words(faster, names), "formula": in_words(formula, names), "verdict": verdict}


def in_words(takes: dict[int, bool], names: tuple[str, str]) -> str:
    """``tokens at 32, 64; library at 128``."""
    few, many = ([str(m) for m, first in sorted(takes.items()) if first is side] for side in (True, False))
    sides = zip(names, (few, many), strict=True)
    return "; ".join(f"{name} at {', '.join(tokens)}" for name, tokens in sides if tokens)


def better_plans(steps: dict[str, Row]) -> list[str]:
    """Plans that are faster than the formula's, and those that failed."""
    lines = []
    for found in found_in(steps, "variants", "p"):
        where = f"{found['kind']} {found['n']} x {found['k']}, M = {found['m']}"
        lines += [f"{where}: {plan['plan']}: {plan['note']}" for plan in found["plans"] if plan["note"]]
        times = {
            plan["plan"]: plan["us"] for plan in found["plans"] if plan["us"] is not None and plan["plan"] != "bf16"
        }
        own = times.get(found["formula"])
        best = min(times, key=times.__getitem__, default=None)
        if best is not None and (own is None or times[best] < WORTH_IT * own):
            formula = f"{found['formula']} {'failed' if own is None else f'{own:.1f} us'}"
            lines.append(f"{where}: {best} {times[best]:.1f} us; {formula}")
    return lines


def rates(steps: dict[str, Row]) -> list[str]:
    lines = []
    for found in found_in(steps, "probes", "rates"):
        for name in ("bytes per second", "bf16 per second"):
            ratio = found[name] / found[f"assumed {name}"]
            lines.append(f"{name}: {found[name]:.3g}, {ratio:.2f} x the assumed {found[f'assumed {name}']:.3g}")
    return lines


if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1]).read_text())))
