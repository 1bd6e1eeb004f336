"""The only module that imports tqdm: bars that stay silent for work shorter than a second, and one-line notices."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

# Seconds of work before the bar appears, so that small models and tests print nothing.
DELAY = 1.0


class Counter(Protocol):
    """What ``byte_progress`` yields: call ``update`` with the number of bytes just processed."""

    def update(self, n: float = 1) -> object: ...


def progress(items: Iterable[T], *, what: str, total: int | None = None, unit: str = "layer") -> Iterator[T]:
    """Yields ``items`` while a bar labeled ``what`` counts them in ``unit``; ``total`` defaults to ``len(items)``."""
    yield from tqdm(items, desc=what, total=total, unit=f" {unit}", delay=DELAY, leave=False)


@contextmanager
def byte_progress(total: int, *, what: str) -> Iterator[Counter]:
    """A bar labeled ``what`` over ``total`` bytes; call ``update(nbytes)`` after each piece."""
    with tqdm(desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1024, delay=DELAY, leave=False) as bar:
        yield bar


def announce(what: str) -> None:
    """Prints one line to standard error before slow work; ``TQDM_DISABLE=1`` silences it, like the bars."""
    if os.environ.get("TQDM_DISABLE", "0") in ("", "0"):
        tqdm.write(what, file=sys.stderr)
