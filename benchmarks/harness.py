"""What the benchmarks share: timing that pairs every candidate with the baseline, and the facts of the machine."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fp8gemm import probe

RESULTS = Path(__file__).parent / "results"


def paired_seconds(
    candidates: Mapping[str, Callable[[], object]], *, seconds: float = 2.0, most: int = 50, least: int = 5
) -> dict[str, float]:
    """Median seconds of each candidate, called in turn so that a noisy moment meets all of them alike."""
    for call in candidates.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + seconds
    for turn in range(most):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
        if turn + 1 >= least and time.perf_counter() > deadline:
            break
    return {name: statistics.median(values) for name, values in samples.items()}


def facts() -> dict[str, Any]:
    """Processor, threads, versions and date: what a number means nothing without."""
    machine = probe("cpu")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "features": sorted(machine.features),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "vllm": machine.vllm_version,
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor()}, {len(named) or '?'} cores"


def save(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Writes benchmarks/results/NAME.json: the facts of the machine, then the rows."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**facts(), **more, "rows": rows}, indent=1) + "\n")
    return path


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as aligned text."""
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
