"""What FP8 would gain in a model, layer by layer: the result of ``estimate``, as text, as plain types and as a page."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import pages
from ..text import columns

# Layers and reasons that the text lists; the rest is counted.
TOP = 10
# A layer is called slower if FP8 takes this much longer: less is within the noise of timing.
SLOWER = 1.05


@dataclass(frozen=True, kw_only=True)
class LayerEstimate:
    """One weight: ``status`` is ``"fp8"`` if it would be converted, else ``"kept"`` with the ``reason``.

    ``shape`` is ``[(E,) N, K]``; ``tokens`` is M, summed over the ``calls`` of one forward pass. ``seconds`` is the
    time of these calls, and ``seconds_fp8`` that on FP8; None where nothing was timed. Bytes are those of the weight,
    as in ``report``. ``ties`` are other names of the same weight.

    Example:
        >>> LayerEstimate(name="a", status="fp8", shape=(8, 8), seconds=6.0, seconds_fp8=2.0).speedup
        3.0
    """

    name: str
    status: str
    shape: tuple[int, ...]
    reason: str = ""
    scheme: str = ""
    engine: str = ""
    ties: tuple[str, ...] = ()
    calls: int = 0
    tokens: int = 0
    seconds: float | None = None
    seconds_fp8: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def speedup(self) -> float | None:
        """Seconds dense over seconds on FP8; None where nothing was timed or the layer did not run."""
        return self.seconds / self.seconds_fp8 if self.seconds and self.seconds_fp8 else None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What ``enable_fp8_gemm`` would gain; ``str(estimate)`` is a table.

    ``seconds`` are those of one forward pass of the dense model, ``attention`` those of attention in it; None if
    nothing was timed, for the reason in ``untimed``. ``place`` says where. ``model_bytes_before`` and ``after`` count
    all parameters and buffers.

    Example:
        >>> layer = LayerEstimate(name="a", status="fp8", shape=(8, 8), seconds=0.6, seconds_fp8=0.2)
        >>> found = Estimate(rows=(layer,), seconds=1.0, attention=0.3)
        >>> round(found.seconds_after, 3), round(found.speedup, 3), round(found.shares["rest"], 3)
        (0.6, 1.667, 0.1)
    """

    rows: tuple[LayerEstimate, ...]
    seconds: float | None = None
    attention: float | None = None
    untimed: str = ""
    place: str = ""
    model_bytes_before: int = 0
    model_bytes_after: int = 0

    @property
    def converted(self) -> tuple[LayerEstimate, ...]:
        """The weights that would be converted."""
        return tuple(row for row in self.rows if row.status == "fp8")

    @property
    def kept(self) -> tuple[LayerEstimate, ...]:
        return tuple(row for row in self.rows if row.status == "kept")

    @property
    def slower(self) -> tuple[LayerEstimate, ...]:
        """The weights whose products would be slower on FP8 by 5 % or more, the slowest first."""
        found = [row for row in self.converted if row.speedup is not None and row.speedup * SLOWER < 1]
        return tuple(sorted(found, key=lambda row: row.speedup or 0.0))

    @property
    def bytes_before(self) -> int:
        """Bytes of all these weights, equal to ``report(model).bytes_before`` after patching."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes after patching, equal to those of ``report``."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def shares(self) -> dict[str, float]:
        """The shares of one forward pass, from 0 to 1: products to convert, those kept dense, attention, the rest.

        Empty if nothing was timed. The rest is what remains, at least 0: the parts are timed apart from the whole.
        """
        if self.seconds is None:
            return {}
        parts = {
            "to convert": sum(row.seconds or 0.0 for row in self.converted) / self.seconds,
            "kept dense": sum(row.seconds or 0.0 for row in self.kept) / self.seconds,
            "attention": (self.attention or 0.0) / self.seconds,
        }
        return {**parts, "rest": max(0.0, 1 - sum(parts.values()))}

    @property
    def seconds_after(self) -> float | None:
        """The predicted seconds of a forward pass on FP8, by Amdahl's law: what is not converted takes as long as
        before."""
        return self._after(self.converted)

    @property
    def speedup(self) -> float | None:
        """How many times as fast the model is predicted to be; None if nothing was timed."""
        return None if self.seconds is None else self.seconds / (self.seconds_after or self.seconds)

    @property
    def speedup_without_slower(self) -> float | None:
        """The same if the layers in ``slower`` stay dense."""
        after = self._after(tuple(row for row in self.converted if row not in self.slower))
        return None if self.seconds is None or not after else self.seconds / after

    def _after(self, rows: tuple[LayerEstimate, ...]) -> float | None:
        if self.seconds is None:
            return None
        dense, fp8 = (sum(getattr(row, which) or 0.0 for row in rows) for which in ("seconds", "seconds_fp8"))
        return max(self.seconds - dense, 0.0) + fp8

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain Python types."""
        rows = [{**asdict(row), "shape": list(row.shape), "speedup": row.speedup} for row in self.rows]
        totals = ("seconds", "seconds_after", "speedup", "speedup_without_slower", "shares", "untimed", "place")
        sizes = ("bytes_before", "bytes_after", "model_bytes_before", "model_bytes_after")
        return {name: getattr(self, name) for name in (*totals, *sizes)} | {"rows": rows}

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the same as a self-contained HTML page."""
        parts = [pages.section("Summary", pages.facts(_facts(self)))]
        if self.shares:
            shares = pages.bars(self.shares, text=_percent, caption="shares of one forward pass")
            parts.append(pages.section("One forward pass", shares))
        rows = [_cells(row, self) for row in _largest(self.converted)]
        parts.append(pages.section("Weights to convert", pages.table(_HEADER, rows, caption="weights to convert")))
        if self.kept:
            lines = [(row.name, "x".join(map(str, row.shape)), row.reason) for row in self.kept]
            parts.append(pages.section("Kept dense", pages.table(("layer", "weight", "reason"), lines)))
        Path(path).write_text(pages.page("What FP8 would gain", *parts), encoding="utf-8")

    def __str__(self) -> str:
        lines = [f"{name}: {text}" for name, text in _facts(self).items()]
        if self.shares:
            lines.insert(0, "one forward pass" + (f" ({self.place})" if self.place else ""))
            times = {"to convert": sum(row.seconds_fp8 or 0.0 for row in self.converted)}
            lines[1:1] = [_share(self, name, times.get(name)) for name in self.shares]
        rows = _largest(_alike(self.converted))
        lines += [_aligned([_HEADER, *(_cells(row, self) for row in rows[:TOP])])] if rows else []
        lines += [f"and {len(rows) - TOP} more"] if len(rows) > TOP else []
        lines += [f"kept: {row.name}: {row.reason}" for row in self.kept[:TOP]]
        lines += [f"kept: {len(self.kept) - TOP} more"] if len(self.kept) > TOP else []
        return "\n".join(lines)


_HEADER = ("layer", "N x K", "M", "calls", "share", "ms", "on FP8", "x", "MB", "after")


def _largest(rows: Iterable[LayerEstimate]) -> list[LayerEstimate]:
    return sorted(rows, key=lambda row: (-(row.seconds or 0.0), -row.bytes_before))


def _alike(rows: Iterable[LayerEstimate]) -> list[LayerEstimate]:
    """Rows whose names differ only in numbers, and that have the same shape, as one: ``layers.*.up (22)``."""
    groups: dict[tuple[object, ...], list[LayerEstimate]] = {}
    for row in rows:
        alike = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name)
        groups.setdefault((alike, row.shape, row.scheme, row.engine, bool(row.ties)), []).append(row)
    return [
        replace(
            group[0],
            name=f"{key[0]} ({len(group)})",
            calls=sum(row.calls for row in group),
            tokens=sum(row.tokens for row in group),
            seconds=_sum(row.seconds for row in group),
            seconds_fp8=_sum(row.seconds_fp8 for row in group),
            bytes_before=sum(row.bytes_before for row in group),
            bytes_after=sum(row.bytes_after for row in group),
        )
        if len(group) > 1
        else group[0]
        for key, group in groups.items()
    ]


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _cells(row: LayerEstimate, found: Estimate) -> tuple[str, ...]:
    timed = row.seconds is not None and found.seconds is not None
    times = (_percent((row.seconds or 0.0) / (found.seconds or 1.0)), _ms(row.seconds), _ms(row.seconds_fp8))
    runs = (str(row.tokens // max(row.calls, 1)), str(row.calls)) if found.seconds is not None else ("", "")
    faster = "" if row.speedup is None else f"{row.speedup:.2f}"
    sizes = (f"{row.bytes_before / 1e6:.2f}", f"{row.bytes_after / 1e6:.2f}")
    shape = " x ".join(map(str, row.shape))
    return (" = ".join((row.name, *row.ties)), shape, *runs, *(times if timed else ("", "", "")), faster, *sizes)


def _facts(found: Estimate) -> Mapping[str, str]:
    """The sums, in words."""
    facts = {}
    if found.seconds is None:
        facts["speed"] = f"not timed: {found.untimed}" if found.untimed else "not timed"
    else:
        facts["predicted"] = (
            f"{_ms(found.seconds)} ms -> {_ms(found.seconds_after)} ms, {found.speedup:.2f} times as fast"
        )
    count = f"{len(found.converted)} to convert, {len(found.kept)} kept dense"
    facts["weights"] = f"{count}, {_megabytes(found.bytes_before)} -> {_megabytes(found.bytes_after)}"
    if found.model_bytes_before:
        facts["whole model"] = f"{_megabytes(found.model_bytes_before)} -> {_megabytes(found.model_bytes_after)}"
    if found.slower:
        names = ", ".join(f"!{row.name}" for row in found.slower[:3])
        more = f" and {len(found.slower) - 3} more" if len(found.slower) > 3 else ""
        facts["slower on FP8"] = (
            f"{len(found.slower)} weights; {found.speedup_without_slower:.2f} times as fast if "
            f"module_filter keeps them dense: {names}{more}"
        )
    return facts


def _share(found: Estimate, name: str, after: float | None) -> str:
    labels = {"to convert": "products to convert", "kept dense": "products kept dense", "rest": "the rest"}
    share = found.shares[name]
    text = f"  {labels.get(name, name):<20}{_percent(share):>8}{_ms(share * (found.seconds or 0.0)):>12} ms"
    return text if after is None else f"{text} -> {_ms(after)} ms on FP8"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    kept = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    return "\n".join(columns([[row[column] for column in kept] for row in rows], right=sum(at < 2 for at in kept)))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3f}" if seconds < 0.01 else f"{1e3 * seconds:.1f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
