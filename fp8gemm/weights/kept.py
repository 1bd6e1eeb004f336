"""Kept originals: dense parameters that were replaced by FP8 weights, and whose later changes still count."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class KeptParameter(nn.Parameter):
    """A parameter that counts writes through ``data``, too, in its version.

    torch's own ``data`` has a version counter of its own; ``detach()`` shares its parameter's.
    """

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, values)  # type: ignore[attr-defined]
        torch.autograd.graph.increment_version(self)


def watch(parameter: Any) -> None:
    """Makes a plain parameter count writes through its ``data``; it stays the same object."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = KeptParameter


def unwatch(parameter: Any) -> None:
    """Undoes ``watch``."""
    if type(parameter) is KeptParameter:
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
