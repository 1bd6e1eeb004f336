"""Which converted layers did not run on FP8, what happened instead, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from .rows import Row

_SHOWN = 20


def problems(rows: Sequence[Row], allow_uncalled: bool | str | Sequence[str], *, pure: bool = False) -> dict[str, str]:
    """What is wrong with each converted layer, by its name, judged by its ``last`` counts.

    Args:
        allow_uncalled: the layers that need not be called: True for all, or glob patterns.
        pure: a dequantization is wrong beside products on FP8, too.

    Raises:
        ValueError: a pattern matches no layer.
    """
    converted = [row for row in rows if row.status == "fp8" or row.replaced]
    allowed = allowed_of([row.name for row in converted], allow_uncalled)
    found = {row.name: _problem(row, uncalled=row.name in allowed, pure=pure) for row in converted}
    return {name: problem for name, problem in found.items() if problem}


def failure(rows: Sequence[Row], wrong: dict[str, str], when: str) -> str:
    """The message that names the layers in ``wrong``."""
    total = sum(row.status == "fp8" or row.replaced for row in rows)
    lines = [f"{len(wrong)} of {total} converted layers did not run on FP8 {when}:"]
    lines += [f"  {name}: {problem}" for name, problem in list(wrong.items())[:_SHOWN]]
    if len(wrong) > _SHOWN:
        lines.append(f"  and {len(wrong) - _SHOWN} more")
    if any(problem.startswith("not called") for problem in wrong.values()):
        lines.append("layers that need not be called, such as experts without tokens: allow_uncalled=True or patterns")
    return "\n".join(lines)


def allowed_of(names: Sequence[str], patterns: bool | str | Sequence[str]) -> frozenset[str]:
    """The names that ``allow_uncalled`` matches."""
    if isinstance(patterns, bool):
        return frozenset(names if patterns else ())
    found = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise ValueError(f"allow_uncalled={pattern!r} matches no converted layer; those are {_some(names)}")
        found |= matched
    return frozenset(found)


def _problem(row: Row, *, uncalled: bool, pure: bool) -> str:
    """What is wrong with one layer; empty if nothing is."""
    if row.replaced:
        return f"{row.reason}; call enable_fp8_gemm again"
    if row.precision == "original":
        return ""  # as was asked for
    last = row.last
    if last is None:
        return "what it did is no longer known, as it was used in several other passes since; run the model again"
    parts = []
    if last.dequantizations and (pure or not last.fp8):
        besides = f", besides {times(last.fp8)} on FP8" if last.fp8 else ""
        parts.append(
            f"dequantized {times(last.dequantizations)}{besides}: something computes with its values; only products "
            "along its rows stay on FP8"
        )
    if last.kept and (pure or not last.fp8):
        parts.append(f"multiplied {times(last.kept)} by the kept original, where FP8 is expected to be slower")
    if not parts and not last.fp8 and not uncalled:
        parts.append("not called" + (": its forward was replaced on the object" if row.overridden else ""))
    return "; ".join(parts)


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
