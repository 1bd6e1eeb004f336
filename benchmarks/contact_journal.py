"""What the steps of benchmarks/first_contact.py and their runner share: the journal of a step, and what a row may be.

A step appends lines of JSON to its journal: ``{"place": {...}}``, ``{"rows": [NAME, ...]}``, then ``{"start": NAME}``
and ``{"row": NAME, "status": ..., "seconds": ..., "note": ..., "found": {...}}`` for each row; or ``{"none": STATUS,
"note": WHY}`` if it has nothing to do here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, REFUSED, FAILED, DIED, TIMED_OUT, NOT_REACHED = "ok", "refused", "failed", "died", "timed out", "not reached"
RUNNING = "running"  # in the record of a first_contact.py that was killed
NO_GPU, NOT_THERE = "no GPU", "not there"  # of whole steps
MARK = "== row "  # printed before each row's own output

Row = dict[str, Any]
Found = dict[str, Any]
Rows = Mapping[str, Callable[[], Found]]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step needs to know: the device, the seconds that it has, and the rows in which it died before."""

    device: str
    seconds: float
    died: tuple[str, ...] = ()


class Refused(Exception):
    """What a row asks for does not exist here, which is no fault."""


class Wrong(Exception):
    """A row that failed, with what it found nevertheless."""

    def __init__(self, note: str, found: Found) -> None:
        super().__init__(note)
        self.found = found


@dataclass(frozen=True)
class Journal:
    """The file through which a step and its runner talk; lines that are not whole are passed over."""

    path: Path

    def add(self, line: Row) -> None:
        with self.path.open("a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # of a process that was killed while it wrote
                    file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def lines(self) -> list[Row]:
        found = []
        for text in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                found.append(line)
        return found

    def names(self) -> list[str]:
        """The rows of the step, once it has told them."""
        return next((line["rows"] for line in self.lines() if "rows" in line), [])

    def started(self) -> list[str]:
        return [line["start"] for line in self.lines() if "start" in line]

    def rows(self) -> list[Row]:
        return [line for line in self.lines() if "row" in line]

    def unfinished(self) -> str | None:
        """The row that was started and has not ended."""
        ended = {row["row"] for row in self.rows()}
        return next((name for name in self.started() if name not in ended), None)

    def none(self) -> Row | None:
        return next((line for line in self.lines() if "none" in line), None)
