"""Example inputs: what a model is run on to see what it does, in evaluation mode and without gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..weights.passes import unnoted


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of a model.

    Example:
        >>> Batch.of({"input": torch.ones(2, 4)}).run(nn.Linear(4, 3)).shape
        torch.Size([2, 3])
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: object) -> Batch:
        """``inputs`` is one argument, a tuple or list of positional arguments, or a mapping of keyword arguments."""
        if isinstance(inputs, Batch):
            return inputs
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs))
        return cls(tuple(inputs)) if isinstance(inputs, (tuple, list)) else cls((inputs,))

    def run(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)


def batches(inputs: object, *, what: str = "calibration_inputs") -> list[Batch]:
    """The batches of ``inputs``: one tensor or mapping, or an iterable of batches such as a list or a DataLoader.

    A tuple is one batch of positional arguments. An iterable is read once, and its batches stay in memory.

    Raises:
        ValueError: there is no batch; ``what`` is the name of the argument in the message.

    Example:
        >>> len(batches([torch.ones(2, 4), torch.ones(1, 4)])), len(batches((torch.ones(2, 4), torch.ones(1, 4))))
        (2, 1)
    """
    if isinstance(inputs, (torch.Tensor, Mapping, tuple, Batch)):
        return [Batch.of(inputs)]
    if not isinstance(inputs, Iterable):
        raise ValueError(f"{what} must be a batch or an iterable of batches, found {type(inputs).__name__}")
    found = [Batch.of(each) for each in inputs]
    if not found:
        raise ValueError(f"{what} has no batches: give at least one tensor, tuple of arguments or mapping")
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes, the state of the random number generators and what the report says of
    the last forward pass are restored."""
    trains = [module for module in model.modules() if module.training]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), unnoted(model):
            yield
    finally:
        for module in trains:
            module.training = True
