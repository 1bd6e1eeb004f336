"""Scales of projections that were joined into one matrix: one scale for each, ``[2]`` or ``[3]``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..scaled import ROW
from .arrangements import Arrangement
from .base import Contents

_HALVES = ("gate_up_proj", "w13", "gate_up", "up_gate_proj")
_ATTENTION = ("qkv_proj", "qkv", "Wqkv", "W_pack", "to_qkv")


def partitions(contents: Contents, module: str, shape: tuple[int, ...], grid: tuple[int, ...]) -> Arrangement | None:
    """A joined matrix whose parts have a scale each, which is repeated for their rows; None if it has none.

    Where the parts end is known for gate and up, which are of one height, and for query, key and value by the number
    of heads in the model's config.
    """
    count = torch.Size(grid).numel()
    if len(shape) != 2 or max(grid, default=0) != count:
        return None
    name = module.rpartition(".")[2]
    heights: Sequence[int] | None = None
    if count == 2 and name in _HALVES and shape[0] % 2 == 0:
        heights = (shape[0] // 2,) * 2
    elif count == 3 and name in _ATTENTION:
        heights = next((found for found in _heads(contents.model_config or {}) if sum(found) == shape[0]), None)
    if heights is None:
        return None
    return Arrangement(shape=shape, granularity=ROW, scale=partial(_repeated, heights=tuple(heights)))


def _repeated(scale: torch.Tensor, *, heights: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([value.expand(height) for value, height in zip(scale.flatten(), heights, strict=True)])


def _heads(config: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """The heights of query, key and value that a config, or the configs in it, describe."""
    heads, hidden = _integer(config, "num_attention_heads", "n_head"), _integer(config, "hidden_size", "n_embd")
    if heads:
        groups = _integer(config, "num_key_value_heads") or heads
        size = _integer(config, "head_dim") or hidden // heads
        yield heads * size, groups * size, groups * size
    for section in config.values():
        if isinstance(section, Mapping):
            yield from _heads(section)


def _integer(config: Mapping[str, Any], *names: str) -> int:
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)
