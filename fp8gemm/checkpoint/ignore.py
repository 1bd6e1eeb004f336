"""Which matrices ``quantize_checkpoint`` leaves dense, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

# Modules whose weight is a matrix but which are not linear layers, or which published FP8 checkpoints leave dense:
# embeddings and routers.
IGNORE = (
    "*embed*",
    "*wte",
    "*wpe",
    "shared",
    "*relative_attention_bias",
    "*.gate",
    "*router*",
    "*shared_expert_gate",
)

# Output heads, which serving engines do not take in FP8.
HEADS = ("*lm_head", "*embed_out", "*output_layer", "output")
_HEAD = "an output head, which serving engines take dense; fp8_heads=True (--fp8-heads) quantizes it"


def ignored(matrices: Mapping[str, object], patterns: Sequence[str], *, fp8_heads: bool) -> dict[str, str]:
    """Module -> why it is left dense.

    Raises:
        ValueError: one of ``patterns`` matches no module.
    """
    kept: dict[str, str] = {}
    unmatched = set(patterns)
    for name in matrices:
        module = name.removesuffix(".weight")
        head = is_head(module)
        for pattern in (*patterns, *(() if head else IGNORE)):
            if _matches(module, pattern):
                kept.setdefault(module, f"ignored by {pattern}")
                unmatched.discard(pattern)
        if head and not fp8_heads:
            kept.setdefault(module, _HEAD)
    if unmatched:
        raise ValueError(f"ignore patterns that match no module: {', '.join(sorted(unmatched))}")
    return kept


def is_head(module: str) -> bool:
    """Whether a module has the name of an output head."""
    return any(_matches(module, pattern) for pattern in HEADS)


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return fnmatchcase(module, pattern)
