"""Stacked experts under the names that checkpoint files use: one matrix per expert."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_EXPERTS = re.compile(r"^(?P<block>.*\bexperts)\.gate_up_proj$")
# Models whose files use Mixtral's names: w1 is gate, w3 is up, w2 is down.
_MIXTRAL = ("mixtral", "minimax", "minimax_m2")


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Part of the tensor ``name``: rows ``start`` to ``stop``, or every ``step``-th of them, of one expert if given.

    ``turned`` if the tensor is a stack ``[E, K, N]``; without ``stop``, it is the whole tensor.
    """

    name: str
    expert: int | None = None
    start: int = 0
    stop: int | None = None
    step: int = 1
    turned: bool = False

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor in the shape that it has in the model."""
        part = tensor if self.expert is None else tensor[self.expert]
        if self.turned:
            part = part.mT
        return part if self.stop is None else part[self.start : self.stop : self.step]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part of a tensor of shape ``whole``."""
        return tuple(self.of(torch.empty(whole, dtype=torch.uint8, device="meta")).shape)


def expert_slices(shapes: Mapping[str, tuple[int, ...]], kind: str) -> dict[str, Slice]:
    """File name -> slice, for the blocks ``gate_up_proj [E, 2I, H]``, ``down_proj [E, H, I]`` in ``shapes``.

    Transposed stacks, ``[E, H, 2I]`` and ``[E, I, H]``, are published stacked and stay so. ``kind`` is the config's
    ``model_type``.
    """
    found = {}
    for name, shape in shapes.items():
        match = _EXPERTS.match(name)
        down_name = f"{match['block']}.down_proj" if match else ""
        down = shapes.get(down_name, ())
        if match is None or not (len(shape) == len(down) == 3 and shape[2] == down[1] and shape[1] == 2 * down[2]):
            continue
        gate, up, out = ("w1", "w3", "w2") if kind in _MIXTRAL else ("gate_proj", "up_proj", "down_proj")
        block, half = file_name(match["block"] + ".", kind), shape[1] // 2
        for index in range(shape[0]):
            found[f"{block}{index}.{gate}.weight"] = Slice(name=name, expert=index, start=0, stop=half)
            found[f"{block}{index}.{up}.weight"] = Slice(name=name, expert=index, start=half, stop=2 * half)
            found[f"{block}{index}.{out}.weight"] = Slice(name=down_name, expert=index, start=0, stop=down[1])
    return found


def file_name(name: str, kind: str) -> str:
    """A model tensor's name in checkpoint files; only the blocks of Mixtral-like models have another name there."""
    if kind not in _MIXTRAL:
        return name
    match = re.match(r"^((?:.*\.)?)\w+(\.(experts|gate|e_score_correction_bias)\b.*)$", name)
    return name if match is None else f"{match[1]}block_sparse_moe{match[2]}"
