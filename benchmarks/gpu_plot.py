"""Plots of the rows of benchmarks/gpu.py, if matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import RESULTS


def plot(rows: list[dict[str, Any]], name: str, directory: Path = RESULTS) -> list[Path]:
    """A plot for each layer: speedup and TFLOP/s over M, each with the bound for an H200."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for (kind, n, k), group in by_layer(rows).items():
        figure, (faster, rate) = pyplot.subplots(1, 2, figsize=(14, 4.5))
        _draw(faster, group, "x bf16", {row["m"]: row["bf16 floor us"] / row["fp8 floor us"] for row in group})
        _draw(rate, group, "TFLOP/s", floor_rates(group))
        faster.set(xscale="log", xlabel="M", ylabel="times faster than bfloat16")
        rate.set(xscale="log", yscale="log", xlabel="M", ylabel="TFLOP/s")
        faster.legend(fontsize=6)
        figure.suptitle(f"{kind} {n} x {k}")
        path = directory / f"{name}_{kind}_{n}x{k}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        written.append(path)
    return written


def _draw(axes: Any, group: list[dict[str, Any]], column: str, floor: Mapping[int, float]) -> None:
    """A line for each candidate, fp8gemm's thicker, and the line of the bound."""
    for candidate in sorted({row["name"] for row in group if column in row}):
        points = sorted((row["m"], row[column]) for row in group if row["name"] == candidate and column in row)
        width = 2.5 if candidate == "fp8gemm auto" else 1
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=width, label=candidate)
    tokens = sorted(floor)
    axes.plot(tokens, [floor[m] for m in tokens], "k--", linewidth=1, label="floor")


def floor_rates(group: list[dict[str, Any]]) -> dict[int, float]:
    """TFLOP/s by M of a product that takes exactly its lower bound in FP8."""
    return {row["m"]: 2 * row["m"] * row["n"] * row["k"] / row["fp8 floor us"] / 1e6 for row in group}


def by_layer(rows: list[dict[str, Any]]) -> Mapping[tuple[str, int, int], list[dict[str, Any]]]:
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["kind"], row["n"], row["k"]), []).append(row)
    return found
