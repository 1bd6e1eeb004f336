"""FP8 products on a CUDA GPU: bfloat16, every engine and every installed peer, in one process.

    python benchmarks/gpu.py [--kinds row,block,grouped] [--models llama-8b,...] [--tokens 1,16,...] [--save gpu]

Each row of the result is one product including the quantization of its activations: its time in a CUDA graph, where
only the GPU counts, and its host time in eager mode, in microseconds. ``fp8gemm auto`` is the layer as made by
``enable_fp8_gemm``, and ``fp8gemm ENGINE`` the product of that engine alone; bfloat16 and torchao are layers, too. Each
candidate is checked against the float32 product of the dequantized operands before it is timed; if it is wrong or
fails, its row has the error only. The graphs of one product run in turn, so that a change of the GPU's clock affects
all of them alike. Weights rotate through more memory than the L2 cache holds; data are random, as zeros run faster.
Peers come from .peers/peers.py, if that folder exists. Results are saved after each product, with the project's goals:
how often each was met, and where it was not.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from card import PEERS, captured, card_here, card_seconds, fault, load_peers, shortly
from gpu_candidates import Candidate, Operands, candidates
from gpu_cases import KINDS, MODELS, TOKENS, cases
from gpu_goals import cells, goals, summary
from gpu_plot import plot
from harness import RESULTS, listed, paired_seconds, save, table, wall_seconds

COLUMNS = [
    "layer",
    "n",
    "k",
    "m",
    "name",
    "graph us",
    "x bf16",
    "x peer",
    "TFLOP/s",
    "host us",
    "x host",
    "error",
    "note",
]
# Relative to products whose activations are not quantized: e4m3 rounds them by up to 2**-4.
ALLOWED_ERROR = 5e-2
GRAPH_SECONDS, GRAPH_CALLS = 4e-3, 256  # approximate length of a graph, so that its own launch is negligible


def main() -> None:
    arguments = parse()
    wanted = list(cases(arguments.kinds, arguments.models, arguments.tokens))
    if not torch.cuda.is_available():
        raise SystemExit(f"{len(wanted)} cases, but no CUDA card: python benchmarks/linear.py measures CPUs")
    peers, notes = load_peers(PEERS)
    card = card_here()
    print(card)
    rows: list[dict[str, Any]] = []
    for case in wanted:
        try:
            measured = measure(Operands(case), peers, arguments.repeats, arguments.skip)
        except torch.OutOfMemoryError as failure:
            measured = [{**vars(case), **case.floors, "name": "operands", "note": shortly(failure)}]
        rows += measured
        print(table(measured, COLUMNS), flush=True)
        more = {**asdict(card), "peers": notes, "goals": goals(rows)}
        path = save(arguments.save, rows, directory=arguments.results, **more)
        if fault():
            print(f"stopped, as a candidate has broken the card for this process: {fault()}")
            break
        gc.collect()
        torch.cuda.empty_cache()
    print(path, *plot(rows, arguments.save, arguments.results), summary(goals(rows)), sep="\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", type=listed(KINDS), default=list(KINDS))
    parser.add_argument("--models", type=listed(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", type=lambda text: [int(m) for m in text.split(",")], default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=20, help="of each timing, whose median counts")
    parser.add_argument("--skip", type=lambda text: text.split(","), default=[], help="parts of candidates' names")
    parser.add_argument("--save", default="gpu", help="writes RESULTS/SAVE.json and plots")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder")
    return parser.parse_args(argv)


@torch.no_grad()
def measure(operands: Operands, peers: ModuleType | None, repeats: int, skip: list[str]) -> list[dict[str, Any]]:
    """A row for each candidate: all are checked, then their graphs are timed in turn, then each in eager mode."""
    case, expected = operands.case, operands.expected()
    rows: list[dict[str, Any]] = []
    ready: dict[str, tuple[dict[str, Any], Callable[[], object], int]] = {}
    made: dict[object, dict[str, Any]] = {}
    for name, maker in candidates(operands, peers).items():
        if any(part in name for part in skip):
            continue
        row = {**vars(case), "name": name, **case.floors}
        rows.append(row)
        if isinstance(maker, str):
            row["note"] = maker
        elif maker in made:
            row |= {"same as": made[maker]["name"], "note": f"is {made[maker]['name']}"}
        else:
            made[maker] = row
            try:
                candidate = maker()
                row |= checked(candidate, expected)
                if row["error"] <= ALLOWED_ERROR:
                    row["host us"] = host_microseconds(candidate.calls, repeats)
                    ready[name] = (row, *graph_of(candidate.calls))
            except Exception as failure:  # a peer may fail in any way; the others are still measured
                row["note"] = shortly(failure)
    try:
        replays = {name: replay for name, (_, replay, _) in ready.items()}
        seconds = paired_seconds(replays, seconds=1.0, most=repeats, clock=card_seconds)
        for name, (row, _, count) in ready.items():
            row["graph us"] = seconds[name] * 1e6 / count
    except RuntimeError as failure:
        for row, _, _ in ready.values():
            row["note"] = shortly(failure)
    return with_ratios(_completed(rows))


def checked(candidate: Candidate, expected: torch.Tensor) -> dict[str, Any]:
    """The relative error of a candidate's product, and a note on it."""
    if candidate.expected is not None:
        expected = candidate.expected()
    error = ((candidate.calls[0]().float() - expected).norm() / expected.norm()).item()
    note = candidate.note() if error <= ALLOWED_ERROR else "wrong, and so not timed"
    return {"error": error, **({"note": note} if note else {})}


def graph_of(calls: list[Callable[[], torch.Tensor]]) -> tuple[Callable[[], object], int]:
    """A CUDA graph of all calls, repeated, and their number; results are dropped at once."""

    def once() -> None:
        for call in calls:
            call()

    rounds = max(1, min(int(GRAPH_SECONDS / card_seconds(captured(once))), GRAPH_CALLS // len(calls)))

    def often() -> None:
        for _ in range(rounds):
            once()

    return captured(often), rounds * len(calls)


def host_microseconds(calls: list[Callable[[], torch.Tensor]], repeats: int) -> float:
    """Median microseconds until a call returns to Python, with an empty queue before it.

    Each layer is called three times before that: fp8gemm binds a shape at the second call.
    """
    samples = []
    for call in itertools.islice(itertools.cycle(calls), 3 * len(calls) + repeats):
        torch.cuda.synchronize()
        samples.append(wall_seconds(call) * 1e6)
    return statistics.median(samples[3 * len(calls) :])


def _completed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same product as another row copy its measurements."""
    named = {row["name"]: row for row in rows}
    return [{**named[row["same as"]], **row} if "same as" in row else row for row in rows]


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one product, with TFLOP/s, the speedups over bfloat16 and, for fp8gemm, over the best peer, and the
    host time relative to bfloat16's."""
    timed = [row for row in rows if "graph us" in row]
    baseline = next((row for row in timed if row["name"] == "bf16"), None)
    best = next((cell.graph.get(cell.best_peer) for cell in cells(timed)), None)
    for row in timed:
        row["TFLOP/s"] = 2 * row["m"] * row["n"] * row["k"] / row["graph us"] / 1e6
        if baseline is not None:
            row["x bf16"] = baseline["graph us"] / row["graph us"]
            row["x host"] = row["host us"] / baseline["host us"]
        if best is not None and row["name"].startswith("fp8gemm "):
            row["x peer"] = best / row["graph us"]
    return rows


if __name__ == "__main__":
    main()
