"""Runs a step of benchmarks/first_contact.py in processes of its own, so that a fault or a hang costs one row.

A step is a program that writes its rows into a journal (contact_journal.py). If it dies in a row, it is started again
and goes on with the next one. Nothing but Python's standard library is imported, so that no broken library can stop
the runner.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from contact_journal import DIED, FAILED, MARK, NOT_REACHED, OK, RUNNING, TIMED_OUT, Journal, Row

ROOT = Path(__file__).parents[1]
POLL = 0.05
LAST_WAIT = 10.0  # seconds for a killed process to end; one that hangs in the driver never does
TAIL = 3000  # characters of a step's output that are kept if it has not gone well


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step: its ``share`` of all minutes, and the most seconds that one of its rows may take."""

    name: str
    what: str
    share: float
    row_seconds: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a step: its command, which is given the journal's path and the seconds that are left."""

    step: Step
    command: Callable[[Path, float], Sequence[str]]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def journal(self) -> Journal:
        return Journal(self.folder / f"{self.step.name}.jsonl")

    @property
    def output(self) -> Path:
        return self.folder / f"{self.step.name}.txt"

    def __call__(self, seconds: float, changed: Callable[[Row], object] = lambda entry: None) -> Row:
        """Runs the step for at most ``seconds``; ``changed`` gets its entry whenever a row starts or ends."""
        began, journal = time.monotonic(), self.journal

        def entry(status: str = "", note: str = "") -> Row:
            return self._entry(seconds, time.monotonic() - began, status, note)

        while True:
            before = len(journal.started())
            status, note = self._attend(began + seconds, lambda: changed(entry()))
            row = journal.unfinished()
            if row is not None:
                journal.add({"row": row, "status": status or DIED, "note": note or "ended within the row"})
                status = note = ""
            started = len(journal.started())
            over = time.monotonic() >= began + seconds
            if journal.none() or over or (journal.names() and started == len(journal.names())):
                return entry(status, note)
            if started == before:  # it would not get further the next time
                return entry(status or DIED, note or "ended without a row")

    def _attend(self, end: float, changed: Callable[[], object]) -> tuple[str, str]:
        """Waits for one process; its status and a note, both empty if it ended well."""
        command = list(self.command(self.journal.path, max(0.0, end - time.monotonic())))
        with self.output.open("ab") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**_environment(), **self.environment},
                start_new_session=True,
            )
            try:
                size, since = self.journal.size, time.monotonic()
                while process.poll() is None:
                    now = time.monotonic()
                    if self.journal.size != size:
                        size, since = self.journal.size, now
                        changed()
                    if now > end:
                        return TIMED_OUT, "the step's time was over"
                    if now - since > self.step.row_seconds:
                        return TIMED_OUT, f"no end in {self.step.row_seconds:.0f} s"
                    time.sleep(POLL)
            finally:
                _end(process)
        code = process.returncode
        if code < 0:
            return DIED, f"killed by {signal.Signals(-code).name}"
        return (DIED, f"exit status {code}") if code else ("", "")

    def _entry(self, limit: float, seconds: float, status: str, note: str) -> Row:
        """What the record says about this step, if its last process ended with ``status`` outside of a row."""
        journal = self.journal
        none, rows, started = journal.none(), journal.rows(), set(journal.started())
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        reports = sanitizer_reports(text)
        rows = [
            {**row, "status": FAILED, "sanitizer": reports[row["row"]]} if row["row"] in reports else row
            for row in rows
        ]
        ended = {row["row"] for row in rows}
        waiting = [name for name in journal.names() if name not in ended]
        rows += [{"row": name, "status": RUNNING if name in started else NOT_REACHED} for name in waiting]
        found = status_of(rows, status) if none is None else none["none"]
        return {
            "step": self.step.name,
            "what": self.step.what,
            "status": found,
            "seconds": round(seconds, 1),
            "limit": round(limit, 1),
            "note": note if none is None else none["note"],
            "place": next((line["place"] for line in journal.lines() if "place" in line), {}),
            "rows": rows,
            **({"output": text[-TAIL:]} if found in (FAILED, TIMED_OUT) else {}),
        }


def status_of(rows: list[Row], ended: str) -> str:
    """The status of a step from those of its rows, and from how its last process ended outside of them."""
    found = {row["status"] for row in rows} | ({ended} if ended else set())
    if found & {FAILED, DIED}:
        return FAILED
    return TIMED_OUT if found & {TIMED_OUT, NOT_REACHED, RUNNING} or not rows else OK


_REPORT = re.compile(r"========= (Invalid|Misaligned|Barrier|Illegal|Stack|Program hit)")
_DETAIL = "=========     "
_MOST_LINES = 6


def sanitizer_reports(output: str) -> dict[str, list[str]]:
    """By row, the start of what compute-sanitizer reported after the mark that a step prints before each row."""
    found: dict[str, list[str]] = {}
    row, inside = "", False
    for line in output.splitlines():
        if line.startswith(MARK):
            row = line.removeprefix(MARK)
        inside = bool(_REPORT.match(line)) or (inside and line.startswith(_DETAIL))
        if inside and len(found.setdefault(row, [])) < _MOST_LINES:
            found[row].append(line.strip("= "))
    return found


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    told = {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    return {**os.environ, **told, "PYTHONPATH": os.pathsep.join(paths)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and those that it started, if they still run."""
    with suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(LAST_WAIT)
