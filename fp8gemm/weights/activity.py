"""What an FP8 weight has done since it was made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Activity:
    """Products, the kernels that ran, and how often the weight was dequantized."""

    calls: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    latest: str = ""  # kernel
    dequantizations: int = 0

    def count(self, kernel: str) -> None:
        """One product, which ran ``kernel``."""
        self.calls += 1
        self.kernels[kernel] += 1
        self.latest = kernel
