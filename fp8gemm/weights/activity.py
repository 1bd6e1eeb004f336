"""Counters of what an FP8 weight has done, in all and since the clock last moved."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

# The names in the report of products with the original: where those are faster, and where they were asked for.
KEPT_KERNEL = "kept 16-bit weight"
ORIGINAL_KERNEL = "original weight"
_REMEMBERED = 4  # times of which an Activity knows its counts


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Products on FP8, products with a kept original, and dequantizations.

    Example:
        >>> Counts(fp8=3, kept=0, dequantizations=1) - Counts(fp8=1, kept=0, dequantizations=1)
        Counts(fp8=2, kept=0, dequantizations=0)
    """

    fp8: int = 0
    kept: int = 0
    dequantizations: int = 0

    def __sub__(self, earlier: Counts) -> Counts:
        return Counts(
            fp8=self.fp8 - earlier.fp8,
            kept=self.kept - earlier.kept,
            dequantizations=self.dequantizations - earlier.dequantizations,
        )


class Clock:
    """The time of this process, which moves where a forward pass of a patched model begins and where it ends."""

    def __init__(self) -> None:
        self._times = itertools.count(1)  # its next is atomic
        self.now = 0

    def tick(self) -> int:
        """The new time."""
        self.now = next(self._times)
        return self.now


CLOCK = Clock()


Mark = tuple[int, int, int, int]  # a time, and the calls, calls on the original and dequantizations before it


def _no_marks() -> list[Mark]:
    return [(-1, 0, 0, 0)] * _REMEMBERED


@dataclass
class Activity:
    """The number of products, the kernels that ran, and the number of dequantizations.

    ``saturated`` of ``checked`` activations were beyond the static range, in ``count_saturation``. ``time`` is when it
    last did anything, and ``marks`` are the last times when it did: a ring, whose latest is at ``latest_mark``.
    """

    calls: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    latest: str = ""  # the kernel that ran last
    dequantizations: int = 0
    saturated: int = 0
    checked: int = 0
    time: int = -1
    marks: list[Mark] = field(default_factory=_no_marks)
    latest_mark: int = 0

    def count(self, kernel: str) -> None:
        """Counts one product, which ran ``kernel``."""
        if self.time != CLOCK.now:
            self.mark()
        self.calls += 1
        self.kernels[kernel] += 1
        self.latest = kernel

    def dequantized(self) -> None:
        """Counts one dequantization."""
        if self.time != CLOCK.now:
            self.mark()
        self.dequantizations += 1

    def mark(self) -> None:
        """Remembers the counts before the first event since the clock moved. Every layer does so in every pass, so that
        it has to be quick."""
        self.time = now = CLOCK.now
        self.latest_mark = at = (self.latest_mark + 1) % _REMEMBERED
        kernels = self.kernels
        kept = kernels.get(KEPT_KERNEL, 0) + kernels.get(ORIGINAL_KERNEL, 0)
        self.marks[at] = (now, self.calls, kept, self.dequantizations)

    def counts(self) -> Counts:
        """All that it has done."""
        kept = self.kernels.get(KEPT_KERNEL, 0) + self.kernels.get(ORIGINAL_KERNEL, 0)
        return Counts(fp8=self.calls - kept, kept=kept, dequantizations=self.dequantizations)

    def between(self, begin: int, end: int) -> Counts | None:
        """What it did from one time until before another, as far as it remembers; None if it remembers nothing."""
        known = sorted(mark for mark in self.marks if mark[0] >= 0)
        if len(known) == _REMEMBERED and known[0][0] >= end:
            return None
        then = [(time, Counts(fp8=calls - kept, kept=kept, dequantizations=more)) for time, calls, kept, more in known]
        then.append((end, self.counts()))
        first = next(counts for time, counts in then if time >= begin)
        return next(counts for time, counts in then if time >= end) - first

    def __getstate__(self) -> dict[str, Any]:
        """Other processes have other clocks."""
        return {**vars(self), "time": -1, "marks": _no_marks()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the state of versions without marks, too."""
        self.__dict__.update({**vars(Activity()), **state})

    def __deepcopy__(self, memo: dict[int, Any]) -> Activity:
        return replace(self, kernels=Counter(self.kernels), marks=list(self.marks))
