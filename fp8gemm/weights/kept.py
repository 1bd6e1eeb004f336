"""Kept originals: parameters whose place in the model an FP8 weight has taken, and whose changes still count."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class KeptParameter(nn.Parameter):
    """A parameter that tells when it was written to, through ``data`` too.

    What torch's own ``data`` gives counts its writes for itself; ``detach()`` shares the count with its parameter.
    """

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, values)  # type: ignore[attr-defined]
        torch.autograd.graph.increment_version(self)


def watch(parameter: Any) -> None:
    """Lets a plain parameter count what is written through its ``data``; it stays the same object."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = KeptParameter


def unwatch(parameter: Any) -> None:
    """Undoes ``watch``."""
    if type(parameter) is KeptParameter:
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
