"""Shared by the benchmarks: timing that pairs every candidate with the baseline, and the machine's properties."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fp8gemm import probe
from fp8gemm.bench.contest import medians
from fp8gemm.engines.vllm import Vllm

RESULTS = Path(__file__).parent / "results"


def wall_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def paired_seconds(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    most: int = 50,
    least: int = 5,
    clock: Callable[[Callable[[], object]], float] = wall_seconds,
) -> dict[str, float]:
    """Median seconds of each candidate, called in turn so that noise affects all of them alike."""
    for call in candidates.values():
        call()
    watches = {name: partial(clock, call) for name, call in candidates.items()}
    return medians(watches, seconds=seconds, most=most, least=least)


@dataclass(frozen=True, kw_only=True)
class Host:
    """Processor, threads, versions and date, which every published number needs."""

    date: str
    processor: str
    features: tuple[str, ...]
    threads: int
    torch: str
    python: str
    vllm: str | None

    def __str__(self) -> str:
        versions = f"torch {self.torch}, python {self.python}" + (f", vllm {self.vllm}" if self.vllm else "")
        return f"{self.processor} ({', '.join(self.features)}), {self.threads} threads, {self.date}, {versions}"


def host() -> Host:
    machine = probe("cpu")
    vllm = machine.facts("vllm", Vllm)
    return Host(
        date=datetime.date.today().isoformat(),
        processor=processor(),
        features=tuple(sorted(machine.features)),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        vllm=None if vllm is None else vllm.version,
    )


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor()}, {len(named) or '?'} cores"


def save(name: str, rows: list[dict[str, Any]], *, directory: Path | None = None, **more: Any) -> Path:
    """Writes NAME.json, by default in benchmarks/results: the machine's properties, then the rows."""
    directory = RESULTS if directory is None else directory
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps({**asdict(host()), **more, "rows": rows}, indent=1) + "\n")
    return path


def add_run(name: str, run: dict[str, Any], *, directory: Path | None = None) -> Path:
    """Adds a run to NAME.json, by default in benchmarks/results: a file of runs, each with its machine and its rows."""
    directory = RESULTS if directory is None else directory
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    runs = load_runs(path) if path.exists() else []
    path.write_text(json.dumps({"runs": [*runs, run]}, indent=1) + "\n")
    return path


def load_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a file that ``add_run`` wrote, oldest first.

    Raises:
        SystemExit: it is another kind of file.
    """
    content = json.loads(path.read_text())
    if not isinstance(content.get("runs"), list):
        raise SystemExit(f"{path} has no runs: it was not written by benchmarks/linear.py --save")
    runs: list[dict[str, Any]] = content["runs"]
    return runs


def busy_cores(seconds: float = 0.5) -> float | None:
    """How many cores other processes keep busy meanwhile; None if the system does not say."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None

    def ticks() -> tuple[int, int]:
        user, nice, system, idle, wait, *rest = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
        return sum((user, nice, system, *rest)), idle + wait

    (busy, idle), _ = ticks(), time.sleep(seconds)
    later, idle_later = ticks()
    total = later - busy + idle_later - idle
    return (later - busy) / total * (os.cpu_count() or 1) if total else None


def last_level_cache() -> int:
    """Bytes of this processor's largest cache; 0 if the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(text[:-1]) * 1024 for size in sizes if (text := size.read_text().strip()).endswith("K")), default=0)


def listed(allowed: Collection[str]) -> Callable[[str], list[str]]:
    """An argument type: comma-separated values from ``allowed``."""

    def split(text: str) -> list[str]:
        wrong = [name for name in text.split(",") if name not in allowed]
        if wrong:
            raise argparse.ArgumentTypeError(f"one of {', '.join(allowed)}, found {', '.join(wrong)}")
        return text.split(",")

    return split


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as aligned text."""
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
