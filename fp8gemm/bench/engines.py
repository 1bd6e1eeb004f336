"""bfloat16's ``F.linear`` beside every engine that accepts a problem on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..engines import ENGINES, Machine, MatmulSpec, PackedWeight, choose, order, probe
from ..errors import UnsupportedError
from ..progress import progress
from ..scaled import SCHEMES, SchemeName
from .contest import Expectation, Result, Weights, bf16_entrant, contest, entrant_of, watch_of
from .place import device_of, facts, shapes_of, sizes_of

SHAPES = ((4096, 4096), (28672, 4096))
TOKENS = (1, 16, 64, 256, 1024)


@torch.no_grad()
def bench(
    shapes: Iterable[tuple[int, int]] = SHAPES,
    *,
    tokens: Iterable[int] = TOKENS,
    scheme: SchemeName = "row",
    device: torch.device | str | None = None,
    engines: Sequence[str] | None = None,
    seconds: float = 1.0,
) -> dict[str, Any]:
    """bfloat16 and engines side by side, each checked before it is timed; facts in plain types.

    Args:
        shapes: weights (N, K).
        device: the current CUDA card by default, else the CPU.
        engines: by default those that ``auto`` tries here, best first; ``"auto"`` is the one that it takes.
        seconds: of timing for each shape and M.

    Raises:
        ValueError: an engine or scheme has no such name, or a size is below 1.
        UnsupportedError: the device is not there, or is neither a CPU nor a CUDA card.
    """
    device = device_of(device)
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, found {scheme!r}")
    names = list(order(probe(device)) if engines is None else engines)
    if wrong := [name for name in names if name not in (*ENGINES, "auto")]:
        raise ValueError(f"engines must be auto or of {', '.join(ENGINES)}, found {', '.join(wrong)}")
    asked, sizes = shapes_of(shapes), sizes_of(tokens)
    rows: list[dict[str, Any]] = []
    for n, k in progress(asked, what="bench", unit="shape"):
        rows += _rows(Weights(n, k, SCHEMES[scheme], device), names, sizes, seconds)
    return {**facts(device), "scheme": str(SCHEMES[scheme]), "dtype": "bfloat16", "rows": rows}


def _rows(weights: Weights, names: list[str], sizes: list[int], seconds: float) -> list[dict[str, Any]]:
    """A row for each M and engine, bfloat16 first."""
    n, k = weights.scaled.shape
    machine = probe(weights.scaled.device)
    auto = _auto(MatmulSpec(scheme=weights.scheme, n=n, k=k), machine)
    wanted = dict.fromkeys(auto if name == "auto" and auto else name for name in names)
    copies, refused = _packed(weights, wanted, machine)
    dense = weights.dense()
    rows = []
    for m in sizes:
        expectation = Expectation(weights.tokens(m), weights)
        entrants = {"bf16": bf16_entrant(dense, expectation)}
        entrants |= {name: entrant_of(ENGINES[name], made, expectation) for name, made in copies.items()}
        results = contest(entrants, watch_of(expectation.x.device), seconds=seconds)
        base = results["bf16"].seconds
        for name, result in (results | refused).items():
            told = {"n": n, "k": k, "m": m, "name": name, "auto": name == auto, "microseconds": None, "x_bf16": None}
            if result.seconds is not None:
                told["microseconds"] = result.seconds * 1e6
                told["x_bf16"] = None if base is None else base / result.seconds
            rows.append({**told, "error": result.error, "note": result.note})
    return rows


def _auto(spec: MatmulSpec, machine: Machine) -> str | None:
    """The engine that ``auto`` takes; None where there is none."""
    try:
        return choose(spec, machine).winner
    except UnsupportedError:
        return None


def _packed(
    weights: Weights, names: Iterable[str], machine: Machine
) -> tuple[dict[str, list[PackedWeight]], dict[str, Result]]:
    """The weight in the layouts of those engines that take it; and why the others do not."""
    n, k = weights.scaled.shape
    spec = MatmulSpec(scheme=weights.scheme, n=n, k=k)
    copies: dict[str, list[PackedWeight]] = {}
    refused: dict[str, Result] = {}
    for name in names:
        reasons = ENGINES[name].rejects(spec, machine) if name in ENGINES else ["no engine takes it"]
        try:
            if not reasons:
                copies[name] = weights.packed(ENGINES[name])
        except UnsupportedError as error:
            reasons = [str(error)]
        if reasons:
            refused[name] = Result(note="; ".join(reasons))
    return copies, refused
