"""Comparing bfloat16's ``F.linear`` with every engine that supports a problem on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..engines import ENGINES, Machine, MatmulSpec, PackedWeight, choose, order, probe
from ..errors import UnsupportedError
from ..progress import progress
from ..scaled import SCHEMES, SchemeName
from .contest import Expectation, Result, Weights, contest, dense_entrant, entrant_of, watch_of
from .place import Setting, device_of, setting_of, shapes_of, sizes_of
from .text import figures

SHAPES = ((4096, 4096), (28672, 4096))
TOKENS = (1, 16, 64, 256, 1024)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One product by bfloat16 or an engine: its time and error, or in ``note`` why it was not timed.

    ``auto`` marks the engine that ``engine="auto"`` chooses; ``x_bf16`` is its speedup over bfloat16.
    """

    n: int
    k: int
    m: int
    name: str
    auto: bool
    microseconds: float | None
    x_bf16: float | None
    error: float | None
    note: str

    def __str__(self) -> str:
        name = f"{self.name} (auto)" if self.auto else self.name
        numbers = figures((self.microseconds, "10.1f"), (self.x_bf16, "8.2f"), (self.error, "9.1e"))
        return f"{f'{self.n} x {self.k}':>15} {self.m:>6}  {name:<16}{numbers}  {self.note}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The results of ``bench``; ``str(comparison)`` is a table."""

    setting: Setting
    scheme: str
    dtype: str
    rows: tuple[Timing, ...]

    @property
    def failed(self) -> bool:
        """Whether only bfloat16 could be timed, or a result was wrong."""
        timed = [row for row in self.rows if row.microseconds is not None and row.name != "bf16"]
        return not timed or any(row.note.startswith("wrong") for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """All results in plain Python types."""
        rows = [asdict(row) for row in self.rows]
        return {**asdict(self.setting), "scheme": self.scheme, "dtype": self.dtype, "rows": rows}

    def __str__(self) -> str:
        what = f"{self.scheme}, {self.dtype}; error: against the float32 product of the same operands"
        columns = f"{'N x K':>15} {'M':>6}  {'engine':<16}{'us':>10}{'x bf16':>8}{'error':>9}"
        return "\n".join([str(self.setting), what, columns, *map(str, self.rows)])


@torch.no_grad()
def bench(
    shapes: Iterable[tuple[int, int]] = SHAPES,
    *,
    tokens: Iterable[int] = TOKENS,
    scheme: SchemeName = "row",
    device: torch.device | str | None = None,
    engines: Sequence[str] | None = None,
    seconds: float = 1.0,
) -> Comparison:
    """Compares bfloat16 and engines; each is checked before it is timed.

    Args:
        shapes: (N, K) of the weights.
        device: by default the current CUDA device if there is one, else the CPU.
        engines: by default those that ``auto`` tries here, best first; ``"auto"`` stands for the one it chooses.
        seconds: the time to spend on each shape and M.

    Raises:
        ValueError: an engine or scheme does not exist, or a size is below 1.
        UnsupportedError: the device does not exist, or is neither a CPU nor a CUDA device.
    """
    device = device_of(device)
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, found {scheme!r}")
    names = list(order(probe(device)) if engines is None else engines)
    if wrong := [name for name in names if name not in (*ENGINES, "auto")]:
        raise ValueError(f"engines must be auto or from {', '.join(ENGINES)}, found {', '.join(wrong)}")
    asked, sizes = shapes_of(shapes), sizes_of(tokens)
    rows: list[Timing] = []
    for n, k in progress(asked, what="bench", unit="shape"):
        rows += _rows(Weights(n, k, SCHEMES[scheme], device), names, sizes, seconds)
    return Comparison(setting=setting_of(device), scheme=str(SCHEMES[scheme]), dtype="bfloat16", rows=tuple(rows))


def _rows(weights: Weights, names: list[str], sizes: list[int], seconds: float) -> list[Timing]:
    """A row for each M and engine, bfloat16 first."""
    n, k = weights.scaled.shape
    machine = probe(weights.scaled.device)
    auto = _auto(MatmulSpec(scheme=weights.scheme, n=n, k=k), machine)
    wanted = dict.fromkeys(auto if name == "auto" and auto else name for name in names)
    copies, refused = pack(weights, wanted, machine)
    dense = weights.dense()
    rows = []
    for m in sizes:
        expectation = Expectation(weights.tokens(m), weights)
        entrants = {"bf16": dense_entrant(dense, expectation)}
        entrants |= {name: entrant_of(ENGINES[name], made, expectation) for name, made in copies.items()}
        results = contest(entrants, watch_of(expectation.x.device), seconds=seconds)
        base = results["bf16"].seconds
        for name, result in (results | refused).items():
            took = result.seconds
            timing = Timing(
                n=n,
                k=k,
                m=m,
                name=name,
                auto=name == auto,
                microseconds=None if took is None else took * 1e6,
                x_bf16=None if took is None or base is None else base / took,
                error=result.error,
                note=result.note,
            )
            rows.append(timing)
    return rows


def _auto(spec: MatmulSpec, machine: Machine) -> str | None:
    """The engine that ``auto`` chooses; None if there is none."""
    try:
        return choose(spec, machine).winner
    except UnsupportedError:
        return None


def pack(
    weights: Weights, names: Iterable[str], machine: Machine
) -> tuple[dict[str, list[PackedWeight]], dict[str, Result]]:
    """The copies packed by each engine that supports them, and why the others do not."""
    n, k = weights.scaled.shape
    spec = MatmulSpec(scheme=weights.scheme, n=n, k=k, compute_dtype=weights.dtype)
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
