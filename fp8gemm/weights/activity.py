"""Counters of what an FP8 weight has done."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Activity:
    """The number of products, the kernels that ran, and the number of dequantizations.

    ``saturated`` of ``checked`` activations were beyond the static range, in ``count_saturation``.
    """

    calls: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    latest: str = ""  # the kernel that ran last
    dequantizations: int = 0
    saturated: int = 0
    checked: int = 0

    def count(self, kernel: str) -> None:
        """Counts one product, which ran ``kernel``."""
        self.calls += 1
        self.kernels[kernel] += 1
        self.latest = kernel
