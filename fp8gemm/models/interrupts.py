"""Deferring Ctrl-C while a model changes, until the current layer is complete."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupts:
    """A SIGINT handler that calls the former handler only where that is safe.

    While ``open``, the former handler runs at once, and ``open`` ends if it raises. Otherwise it runs at the next
    ``deliver``.
    """

    def __init__(self) -> None:
        self.open = False
        self.former: Any = None  # the handler; None if there is nothing to defer
        self._waiting: tuple[Any, ...] | None = None

    def begin(self) -> None:
        former = signal.getsignal(signal.SIGINT)
        # Signal handlers run in the main thread, and only those written in Python can raise there.
        if callable(former) and threading.current_thread() is threading.main_thread():
            self.former = former
            signal.signal(signal.SIGINT, self)

    def __call__(self, *given: Any) -> None:
        if not self.open:
            self._waiting = given
            return
        self.open = False
        self.former(*given)
        self.open = True

    def deliver(self) -> None:
        """Calls the former handler if a signal arrived in the meantime."""
        given, self._waiting = self._waiting, None
        if given is not None:
            self.former(*given)

    def drop(self) -> None:
        """Forgets signals that arrived in the meantime."""
        self._waiting = None


def undisturbed(act: Callable[[Interrupts], T]) -> T:
    """Runs ``act``, which decides when Ctrl-C may interrupt it."""
    interrupts = Interrupts()
    try:
        interrupts.begin()
        return act(interrupts)
    finally:
        if interrupts.former is not None:
            signal.signal(signal.SIGINT, interrupts.former)
        interrupts.deliver()
