"""The only module that imports tqdm: bars that stay silent for work shorter than a second, and one-line notices."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar
from weakref import WeakSet

from tqdm.auto import tqdm

T = TypeVar("T")

# Seconds of work before the bar appears, so that small models and tests print nothing.
DELAY = 1.0


class _Bar(tqdm):  # type: ignore[misc]
    """A bar whose lock belongs to this process alone.

    tqdm's own is a semaphore that forked children share: a child that ends while it holds it stops its parent for good.
    """

    monitor_interval = 0
    _instances: ClassVar[WeakSet[Any]] = WeakSet()


def _own_lock() -> None:
    _Bar.set_lock(threading.RLock())


_own_lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_own_lock)  # another thread may have held it


class Counter(Protocol):
    """What ``byte_progress`` and ``counting`` yield: call ``update`` with the number of bytes or units just done."""

    def update(self, n: float = 1) -> object: ...


def progress(items: Iterable[T], *, what: str, total: int | None = None, unit: str = "layer") -> Iterator[T]:
    """Yields ``items`` while a bar labeled ``what`` counts them in ``unit``; ``total`` defaults to ``len(items)``."""
    yield from _Bar(items, desc=what, total=total, unit=f" {unit}", delay=DELAY, leave=False)


@contextmanager
def byte_progress(total: int, *, what: str) -> Iterator[Counter]:
    """A bar labeled ``what`` over ``total`` bytes; call ``update(nbytes)`` after each piece."""
    with _Bar(desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1024, delay=DELAY, leave=False) as bar:
        yield bar


@contextmanager
def counting(total: int, *, what: str, unit: str) -> Iterator[Counter]:
    """A bar labeled ``what`` over ``total`` units; call ``update()`` after each."""
    with _Bar(desc=what, total=total, unit=f" {unit}", delay=DELAY, leave=False) as bar:
        yield bar


def announce(what: str) -> None:
    """Prints one line to standard error before slow work; ``TQDM_DISABLE=1`` silences it, like the bars."""
    if os.environ.get("TQDM_DISABLE", "0") in ("", "0"):
        _Bar.write(what, file=sys.stderr)
