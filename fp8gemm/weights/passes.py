"""When the last forward pass of a patched model began and ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .activity import CLOCK
from .linear import FP8Linear

_DEEPEST = 64  # of calls of a model by itself


class Passes:
    """Two hooks on a model that move the clock where a forward pass begins and ends; what a compiled pass did is
    not in any of these.

    Attributes:
        last: the times between which the last pass that has returned was running; None before one.
    """

    def __init__(self, last: tuple[int, int] | None = None) -> None:
        self.last = last
        self.begun = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Passes:
        return Passes(self.last)

    def __reduce__(self) -> Any:
        """Other processes have other clocks."""
        return (Passes, ())

    def before(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        times = self.begun.__dict__.setdefault("times", [])
        del times[:-_DEEPEST]  # of passes that raised, for which torch calls no hook
        times.append(CLOCK.tick())

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if times := self.begun.__dict__.get("times"):  # else installed during the pass
            self.last = (times.pop(), CLOCK.tick())


def install(model: nn.Module) -> None:
    """Has the passes of ``model`` noted from now on; those of a single FP8Linear are not, as two hooks would cost a
    large part of a small product."""
    remove(model)
    if not isinstance(model, FP8Linear):
        passes = Passes()
        model.register_forward_hook(passes.after)
        model.register_forward_pre_hook(passes.before)


def remove(model: nn.Module) -> None:
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Passes):
                hooks.pop(key, None)


@contextmanager
def unnoted(model: nn.Module) -> Iterator[None]:
    """Afterwards, the last pass of ``model`` is what it was before: those in the block say nothing of how it is
    used."""
    noted = passes_of(model)
    last = None if noted is None else noted.last
    try:
        yield
    finally:
        if noted is not None:
            noted.last = last


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` itself, or what ``torch.compile(model)`` has wrapped."""
    inside: nn.Module = getattr(model, "_orig_mod", model)
    return inside


def passes_of(model: nn.Module) -> Passes | None:
    """What notes the passes of ``model``, if anything does."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Passes)), None)
