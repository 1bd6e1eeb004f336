"""What a case of the quality figures is: a real model from a package, a task, and what is measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a model gives: ``values`` ``[items, ...]``, and what it decides, where these are not all of it."""

    values: torch.Tensor
    answer: Any = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model (float32, evaluation mode), a run of it on the task's inputs, and the measures of a run.

    ``measures`` takes the output of a converted model and that of the dense one.
    """

    model: nn.Module
    run: Callable[[nn.Module], Output]
    measures: Callable[[Output, Output], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table of models.

    ``packages`` maps the modules that ``load`` reads to what pip installs them by. ``score`` and ``agreement`` are
    the measures of the task that the page shows: how well the task is solved, and how much of the dense model's answer
    is kept. ``dense`` are patterns of layers that FP8 does not suit, with ``why``; rows without and with them show it.
    """

    name: str
    kind: str
    packages: Mapping[str, str]
    license: str
    score: str
    agreement: str
    load: Callable[[], Task]
    dense: tuple[str, ...] = ()
    why: str = ""

    @property
    def missing(self) -> str:
        """What must be installed first; empty if nothing."""
        absent = [package for module, package in self.packages.items() if importlib.util.find_spec(module) is None]
        return f"not installed: pip install {' '.join(absent)}" if absent else ""


def folder(module: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(module)
    return Path(next(iter(spec.submodule_search_locations)))
