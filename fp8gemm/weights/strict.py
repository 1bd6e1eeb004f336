"""A block in which every converted layer must run on FP8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from .activity import Activity, Counts
from .passes import unwrapped
from .ran import allowed_of, failure, problems
from .rows import Row, activities, rows

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def strict(model: Model, *, allow_uncalled: bool | str | Sequence[str] = False) -> Iterator[Model]:
    """Raises if a converted layer of ``model`` does not run on FP8 while the block lasts.

    Each forward pass of the model raises at its end if a layer has been dequantized, has multiplied by a kept original,
    or had its weight replaced by a dense one since the block began. The end of the block raises for the same reasons,
    which covers compiled passes and calls of parts of the model too, and for layers that were never called in the
    block. Nothing is raised in place of another exception. Of ``torch.compile(model)``, each compiled pass is checked.

    Args:
        allow_uncalled: the layers that need not be called, such as experts without tokens: True for all, or one or more
            glob patterns over their names.

    Raises:
        ValueError: a layer did not run on FP8; the message names each, with what happened instead. Or the model has
            no converted layer, or a pattern matches none.

    Example:
        >>> from fp8gemm import enable_fp8_gemm
        >>> model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32)))
        >>> with strict(model):
        ...     y = model(torch.randn(2, 64))
        >>> with strict(model):
        ...     y = torch.randn(2, 64) @ model[0].weight.dequantize().T
        Traceback (most recent call last):
        ...
        ValueError: 1 of 1 converted layers did not run on FP8 in this block:
          0: dequantized once: something computes with its values; only products along its rows stay on FP8
    """
    inside = unwrapped(model)
    before = {id(activity): (activity, activity.counts()) for activity in activities(inside).values()}
    if not before:
        raise ValueError("the model has no FP8 weights to watch: call enable_fp8_gemm(model) first")
    allowed_of([row.name for row in rows(inside) if row.status == "fp8"], allow_uncalled)
    watch = _Watch(before)
    hook = model.register_forward_hook(watch.after)
    try:
        yield model
    finally:
        hook.remove()
    found = watch.since(inside)
    if wrong := problems(found, allow_uncalled, pure=True):
        raise ValueError(failure(found, wrong, "in this block"))


class _Watch:
    """What has happened since the block began."""

    def __init__(self, before: dict[int, tuple[Activity, Counts]]) -> None:
        self.before = before

    def since(self, model: nn.Module) -> list[Row]:
        """The rows, whose ``last`` counts from the beginning of the block."""
        now = activities(model)
        return [replace(row, last=self._since(now[row.name])) if row.name in now else row for row in rows(model)]

    def _since(self, activity: Activity) -> Counts:
        return activity.counts() - self.before.get(id(activity), (activity, Counts()))[1]

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """The end of a forward pass; layers may still be called later."""
        if torch.compiler.is_compiling():
            return
        found = self.since(unwrapped(model))
        if wrong := problems(found, True, pure=True):
            raise ValueError(failure(found, wrong, "by the end of this forward pass"))
