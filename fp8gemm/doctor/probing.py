"""Probing engines by exact products in a child process, so that a crash or a hang is a row and not the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import torch

ProbeName = Literal["none", "cpu", "all"]
PROBES = get_args(ProbeName)
CASE_SECONDS = {"cpu": 15.0}  # for one product, by kind of device; the first one on a CPU may compile the kernels
CASE_SECONDS_ELSEWHERE = 180.0  # where kernels are compiled at their first use
START_SECONDS = 120.0  # to import torch, find the engines and list the products
TOTAL_SECONDS = 900.0
_POLL = 0.02
_KILL_SECONDS = 10.0  # for a killed process to end; one that hangs in a driver never does
_NOTE = 300  # characters of a note

STARTING = "looking for the engines"
_EXIT_STATUS = "exit status"


@dataclass(frozen=True, kw_only=True)
class ProbedProduct:
    """A product of one engine, of one kind, under one scheme.

    ``status`` is ``"exact"``; ``"refused"``, if the engine says that it does not take such a weight; ``"wrong"``;
    ``"failed"``, if it raised; ``"died"`` or ``"timed out"``, of the process; or ``"not run"``, after such a product
    of the same engine. ``note`` says more.
    """

    device: str
    engine: str
    scheme: str
    case: str
    status: str
    note: str = ""
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        return self.status not in ("exact", "refused")

    @property
    def fatal(self) -> bool:
        """Whether already looking for the engines ends a process, or hangs."""
        return self.case == STARTING and not self.note.startswith(f"{_EXIT_STATUS} 1:")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def probe_engines(
    devices: Sequence[torch.device | str] = ("cpu",),
    *,
    imports: Sequence[str] = (),
    case_seconds: float | None = None,
) -> tuple[ProbedProduct, ...]:
    """Runs exact products of every engine that does not reject them, in a process of its own, and compares every bit.

    The products are each engine's own check (as before it is used on an accelerator: one to 96 tokens, NaN, tiny
    values, all its kernels), one token, zero rows in tokens and weight, a NaN in one row, sizes that are multiples of
    nothing, K = 16384, and experts; under each scheme. After a product in which the process dies or that takes more
    than ``case_seconds``, that engine's other products are not run.

    Args:
        imports: modules that the process imports first, which register engines of yours.
        case_seconds: for one product; by default 15 on a CPU and 180 elsewhere, where kernels are compiled.

    Example:
        >>> found = probe_engines(["cpu"])
        >>> {row.status for row in found if row.engine == "cpu"}
        {'exact'}
    """
    names = [str(device) for device in devices]
    with tempfile.TemporaryDirectory(prefix="fp8gemm-doctor-") as folder:
        run = _Run(Path(folder), names, list(imports), case_seconds)
        return tuple(run.rows())


class _Run:
    """The products, what is known of each, and the processes that run them one after the other."""

    def __init__(self, folder: Path, devices: list[str], imports: list[str], case_seconds: float | None) -> None:
        self.folder, self.devices, self.imports, self.case_seconds = folder, devices, imports, case_seconds
        self.products: list[dict[str, str]] = []
        self.ended: dict[int, tuple[str, str, float]] = {}
        self.begun: int | None = None  # the product that runs
        self.over = False  # whether all have been run
        self.stopped: dict[tuple[str, str], str] = {}  # by device and engine, why its other products are not run
        self.fault = ("not run", "")  # how the last process ended outside of a product
        self.end = time.monotonic() + TOTAL_SECONDS

    def rows(self) -> Iterator[ProbedProduct]:
        done: int | None = 0
        while done is not None:
            done = self._attend(done)
        if not self.products:
            status, note = self.fault
            where = ",".join(self.devices)
            yield ProbedProduct(device=where, engine="", scheme="", case=STARTING, status=status, note=note)
        for number, product in enumerate(self.products):
            why = self.stopped.get((product["device"], product["engine"]), ": ".join(self.fault))
            status, note, seconds = self.ended.get(number, ("not run", why, 0.0))
            yield ProbedProduct(**product, status=status, note=note[:_NOTE], seconds=round(seconds, 3))

    def _attend(self, done: int) -> int | None:
        """Runs a process that begins with product ``done``; the product with which the next one has to begin, None if
        there is nothing to go on with."""
        journal, output = self.folder / f"journal{done}", self.folder / f"output{done}"
        request = {
            "journal": str(journal),
            "devices": self.devices,
            "imports": self.imports,
            "done": done,
            "skipped": [list(pair) for pair in self.stopped],
        }
        began = time.monotonic()
        with output.open("wb") as stream, _started(json.dumps(request), stream) as process:
            why = self._follow(process, journal)
        if self.over:
            return None
        status, note = ("timed out", why) if why else ("died", _death(process.returncode, output))
        self.fault = status, note
        if self.begun is None:
            return None
        begun, self.begun = self.begun, None
        product = self.products[begun]
        self.ended[begun] = status, note, time.monotonic() - began
        pair = product["device"], product["engine"]
        self.stopped[pair] = f"{status} before, under {product['scheme']}, {product['case']}"
        return begun + 1 if time.monotonic() < self.end else None

    def _follow(self, process: subprocess.Popen[bytes], journal: Path) -> str:
        """Reads the journal until the process ends or has taken too long; empty, or why it is to be killed."""
        seen, since = 0, time.monotonic()
        while True:
            running = process.poll() is None
            for line in _lines(journal, seen):
                seen, since = seen + 1, time.monotonic()
                self.products = line.get("products", self.products)
                self.begun = line.get("begin")
                self.over = "over" in line
                if "end" in line:
                    self.ended[line["end"]] = line["status"], line["note"], line["seconds"]
            now, limit = time.monotonic(), self._limit()
            if not running:
                return ""
            if now > self.end:
                return "the probe's time was over"
            if now > since + limit:
                return f"no end in {limit:.0f} s"
            time.sleep(_POLL)

    def _limit(self) -> float:
        if self.begun is None:
            return START_SECONDS
        kind = self.products[self.begun]["device"].split(":")[0]
        return self.case_seconds or CASE_SECONDS.get(kind, CASE_SECONDS_ELSEWHERE)


@contextmanager
def _started(request: str, output: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs ``cases``, and is killed with all that it has started at the end of the block."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-m", "fp8gemm.doctor.cases", request],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError, PermissionError):
            if sys.platform == "win32":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_SECONDS)


def _lines(journal: Path, seen: int) -> list[dict[str, Any]]:
    """The complete lines of a journal after the first ``seen`` ones."""
    if not journal.exists():
        return []
    *complete, _ = journal.read_text().split("\n")
    return [json.loads(line) for line in complete[seen:]]


def _death(status: int | None, output: Path) -> str:
    """How a process ended, and the last line that it has written; after a fault, where in this package it was."""
    how = f"{_EXIT_STATUS} {status}"
    if status is not None and status < 0:
        with suppress(ValueError):
            how = signal.Signals(-status).name
    text = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    fault = next((line for line in text if line.startswith("Fatal Python error")), text[-1] if text else "")
    if fault.startswith("Fatal"):
        package = f'File "{Path(__file__).parents[1]}'
        frames = [line.strip() for line in text if line.strip().startswith(package)]
        fault = ", ".join([fault, *frames[:1]])
    return f"{how}: {fault}" if fault else how
