"""A small model that can go wrong in several ways, and what its layers did in the last forward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fp8gemm import enable_fp8_gemm, report
from fp8gemm.weights.activity import Counts

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
READS = "something computes with its values; only products along its rows stay on FP8"


class Branches(nn.Module):
    """A body, a head that is called only if asked for, and ways to go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(32, 32), nn.Linear(32, 16)
        self.reads = self.inner = False

    def forward(self, x: torch.Tensor, head: bool = True) -> torch.Tensor:
        if self.inner:
            self.inner = False
            self(x, head=False)
        x = F.linear(x, self.body.weight.dequantize()) if self.reads else self.body(x)  # type: ignore[operator]
        return self.head(x) if head else x  # type: ignore[no-any-return]


def branches() -> Any:
    torch.manual_seed(0)
    return enable_fp8_gemm(Branches().eval())


def last(model: nn.Module) -> dict[str, Counts | None]:
    return {row.name: row.last for row in report(model).rows}
