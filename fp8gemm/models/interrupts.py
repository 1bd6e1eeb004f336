"""Ctrl-C while a model changes: it waits until the layer at hand is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupts:
    """A handler of SIGINT that lets the former one act only where that does no harm.

    While ``open`` that acts at once, and where it raises ``open`` is over. Else it acts at the next ``deliver``.
    """

    def __init__(self) -> None:
        self.open = False
        self.former: Any = None  # the handler; None where there is nothing to put off
        self._waiting: tuple[Any, ...] | None = None

    def begin(self) -> None:
        former = signal.getsignal(signal.SIGINT)
        # Handlers run in the main thread, and only those that Python runs can raise there.
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
        """Lets the former handler act on what came in the meantime."""
        given, self._waiting = self._waiting, None
        if given is not None:
            self.former(*given)

    def drop(self) -> None:
        """Forgets what came in the meantime."""
        self._waiting = None


def undisturbed(act: Callable[[Interrupts], T]) -> T:
    """Runs ``act``, which says when it may be interrupted by Ctrl-C."""
    interrupts = Interrupts()
    try:
        interrupts.begin()
        return act(interrupts)
    finally:
        if interrupts.former is not None:
            signal.signal(signal.SIGINT, interrupts.former)
        interrupts.deliver()
