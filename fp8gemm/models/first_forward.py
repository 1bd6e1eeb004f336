"""Observing the first forward pass of a patched model, once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from .. import native
from ..weights.watching import jit_tracing
from .observation import Observer

Then = Callable[[nn.Module, Observer], None]


class FirstForward:
    """Observes the first forward pass of a model, by two hooks on the model that remove themselves afterwards.

    A pass that is compiled, traced, captured or observed by someone else is skipped, and the next one is observed.
    """

    def __init__(self, then: Then) -> None:
        self.then = then
        self.thread: dict[str, int] = {}  # the thread of the observed pass: set once, atomically
        self.observer: Observer | None = None
        self.depth = 0
        self.cancelled = False

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstForward:
        return FirstForward(self.then)

    def __reduce__(self) -> Any:
        return (FirstForward, (self.then,))

    def install(self, model: nn.Module) -> None:
        """Registers the hooks on a model, replacing earlier ones; an interruption never leaves only the first of the
        two."""
        remove(model)
        model.register_forward_hook(self.after, always_call=True)
        model.register_forward_pre_hook(self.before, prepend=True)

    def before(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self.observer is not None and self.thread["it"] == threading.get_ident():
            if _running(model) > 1:  # the model calls itself
                self.depth += 1
                return
            self.end()  # torch calls no hook when a pass is left by Ctrl-C
        if not _undisturbed(args) or self.thread.setdefault("it", threading.get_ident()) != threading.get_ident():
            return
        self.observer, self.depth = Observer(model), 1
        self.observer.__enter__()  # type: ignore[no-untyped-call]

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self.observer is None or self.thread["it"] != threading.get_ident():
            return
        self.depth -= 1
        if self.depth == 0:
            observer = self.end()
            remove(model)
            if not self.cancelled:
                self.then(model, observer)

    def end(self) -> Observer:
        """Removes the dispatch mode, unless another mode is on top of it."""
        observer = self.observer
        assert observer is not None
        self.observer, observer.over = None, True
        if _get_current_dispatch_mode() is observer:
            observer.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return observer


def remove(model: nn.Module) -> None:
    """Removes the hooks of a FirstForward; one that is observing in another thread removes its own."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            first = getattr(hook, "__self__", None)
            if not isinstance(first, FirstForward):
                continue
            if first.observer is not None:
                first.cancelled = True
                continue
            hooks.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)


def _running(model: nn.Module) -> int:
    """How many calls of a module are in progress in this thread."""
    code, count = nn.Module._call_impl.__code__, 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        count += frame.f_code is code and frame.f_locals.get("self") is model
        frame = frame.f_back
    return count


def _undisturbed(args: Any) -> bool:
    """Whether nothing else observes, traces, captures or distributes the pass."""
    tensors: Iterator[torch.Tensor] = (leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return native.plain(*tensors) and not (capturing or jit_tracing() or several)
