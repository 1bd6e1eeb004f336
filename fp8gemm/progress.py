"""The one door to tqdm: a bar that stays silent for work shorter than a second, and a line for what has no length."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

# Seconds of work before the bar appears: small models and tests print nothing.
DELAY = 1.0


class Counter(Protocol):
    """What ``byte_progress`` hands out: tell it how many bytes were just done."""

    def update(self, n: float = 1) -> object: ...


def progress(items: Iterable[T], *, what: str, total: int | None = None, unit: str = "layer") -> Iterator[T]:
    """Yield ``items`` while a bar named ``what`` counts them in ``unit``; ``total`` is ``len(items)`` if it has one."""
    yield from tqdm(items, desc=what, total=total, unit=f" {unit}", delay=DELAY, leave=False)


@contextmanager
def byte_progress(total: int, *, what: str) -> Iterator[Counter]:
    """A bar named ``what`` over ``total`` bytes, to be told of each piece with ``update(nbytes)``."""
    with tqdm(desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1024, delay=DELAY, leave=False) as bar:
        yield bar


def announce(what: str) -> None:
    """Says in one line on standard error what takes a while from now on; ``TQDM_DISABLE=1`` silences it, as bars."""
    if os.environ.get("TQDM_DISABLE", "0") in ("", "0"):
        tqdm.write(what, file=sys.stderr)
