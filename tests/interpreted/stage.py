"""Engines that run as if on a GPU, restricted to one kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import interpreter  # noqa: F401  it mends the interpreter's conversions
import torch

from fp8gemm import ROW, Machine, ScaledTensor, Scheme
from fp8gemm.engines import PackedWeight
from fp8gemm.engines.triton.engine import TritonEngine, installed
from fp8gemm.engines.triton.plan import Place, Plan, place

MACHINE = Machine(device="cuda", capability=(9, 0), found={"triton": installed()})
# Three multiprocessors, so that persistent kernels loop over several tiles each.
ADA = replace(place((8, 9), multiprocessors=3), library=frozenset())
HOPPER = place((9, 0), multiprocessors=3)
AMPERE = place((8, 0), multiprocessors=3)


class OnCard(TritonEngine):
    """The engine as on a GPU, including its dispatch."""

    def __init__(self, where: Place = HOPPER, **more: Any) -> None:
        super().__init__(**more)
        self.where = where

    def place(self, device: torch.device) -> Place:
        return self.where


class Held(OnCard):
    """Runs every product by one plan; ``activation`` is the quantization that the plan makes of a scheme's."""

    def __init__(self, plan: Plan, *, rounds_to: str, where: Place = HOPPER) -> None:
        super().__init__(where)
        self.held, self.rounds_to = plan, rounds_to

    def effective(self, scheme: Scheme) -> Scheme:
        if self.rounds_to == "nothing":
            return scheme.weight_only()
        return replace(scheme, activation=ROW) if self.rounds_to == "rows" else scheme

    def plan(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> Plan:
        return self.held


def packed(weight: ScaledTensor, scheme: Scheme) -> PackedWeight:
    """A weight as the kernels' launchers need it."""
    return OnCard().prepare(weight, scheme)
