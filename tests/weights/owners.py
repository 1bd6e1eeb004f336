"""Example modules of every kind that owns FP8 weights: Linears, stacks of experts, bare parameters, tied weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fp8gemm import FP8GemmOptions
from fp8gemm.weights import convert, put

KINDS = ("linear", "plain", "turned", "own", "tied")


class Experts(nn.Module):
    """``x [E, M, K]`` through stacks ``[E, N, K]``, or ``[E, K, N]`` if transposed (``turned``)."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        up, down = ((3, 32, 48), (3, 24, 32)) if turned else ((3, 48, 32), (3, 32, 24))
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(shape) / 6) for shape in (up, down))
        self.turned = turned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = self.gate_up_proj, self.down_proj
        up, down = (up, down) if self.turned else (up.transpose(1, 2), down.transpose(1, 2))
        gate, y = (x @ up).chunk(2, dim=-1)
        return (gate * y) @ down


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(32, 64) / 8)
        self.weight = nn.Parameter(torch.randn(64, 32) / 8)
        self.gain = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * ((x @ self.matrix.T) @ self.weight.T)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def dense(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A module and an input for it."""
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)).eval(), torch.randn(3, 64)
    if kind in ("plain", "turned"):
        return Experts(turned=kind == "turned").eval(), torch.randn(3, 5, 32)
    return (Own() if kind == "own" else Tied()).eval(), torch.randn(3, 64)


def in_fp8(kind: str, scheme: Any = "row", storage: Any = "discard") -> tuple[nn.Module, torch.Tensor]:
    """The same module with its matrices in FP8."""
    module, x = dense(kind)
    options = FP8GemmOptions(scheme=scheme, fp16_weight_storage=storage)
    if kind == "tied":
        weight = convert(module.first, "weight", options)
        put(module.second, "weight", weight)
        return module, x
    for owner in list(module.modules()):
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None and parameter.dim() > 1:
                convert(owner, name, options, turned=kind == "turned")
    return module, x


def forget(module: nn.Module) -> nn.Module:
    """Puts other values in every parameter, so that a later load has a visible effect."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-2)
    return module
