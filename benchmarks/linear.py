"""One Linear: ``F.linear`` in the model's dtype compared with every engine that runs here, paired; medians.

    python benchmarks/linear.py [--shapes 4096x4096,...] [--tokens 1,16,...] [--dtype bfloat16] [--cold MB] ...

Everything is checked before it is timed, as by ``fp8gemm bench``. ``--cold MB`` rotates through a stack of layers whose
dense weights take that much memory, as in a real model; without it, a single layer stays in the cache.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import host, save, table

from fp8gemm import ENGINES, SCHEMES, ScaledTensor, Scheme, probe
from fp8gemm.bench.contest import (
    BF16_TOLERANCE,
    Entrant,
    Expectation,
    Weights,
    contest,
    dense_entrant,
    entrant_of,
    watch_processor,
)
from fp8gemm.bench.engines import pack

CPU = torch.device("cpu")


def main() -> None:
    arguments = parse()
    print(host())
    rows = []
    for shape, scheme in itertools.product(arguments.shapes.split(","), arguments.schemes.split(",")):
        n, k = map(int, shape.split("x"))
        layers = Layers(n, k, SCHEMES[scheme], arguments)
        for m in map(int, arguments.tokens.split(",")):
            row = {"n": n, "k": k, "m": m, "scheme": scheme, **layers.measure(m, arguments.seconds)}
            rows.append(row)
            print(table([row], list(row)), flush=True)
    print(table(rows, list(rows[0])))
    if arguments.save:
        print(save(arguments.save, rows, dtype=arguments.dtype, cold_megabytes=arguments.cold))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="N x K")
    parser.add_argument("--tokens", default="1,16,128,1024")
    parser.add_argument("--schemes", default="row")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engines", default="vllm,cpu", help="those that reject the problem are left out")
    parser.add_argument("--cold", type=int, default=0, help="MB of dense weights to rotate through")
    parser.add_argument("--peers", action="store_true", help="also what others do, at 1 and 16 tokens, one warm layer")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row of the table")
    parser.add_argument("--save", help="write benchmarks/results/SAVE.json")
    return parser.parse_args()


class Layers:
    """Many copies of the same layer: dense weights, and the same weights packed by each engine."""

    def __init__(self, n: int, k: int, scheme: Scheme, arguments: argparse.Namespace) -> None:
        dtype: torch.dtype = getattr(torch, arguments.dtype)
        count = max(1, -(-arguments.cold * 10**6 // (n * k * dtype.itemsize)))
        self.weights = Weights(n, k, scheme, CPU, dtype=dtype, count=count)
        self.dense = self.weights.dense()
        self.packed, refused = pack(self.weights, arguments.engines.split(","), probe("cpu"))
        for name, result in refused.items():
            print(f"{name}: {result.note}")
        self.peers = peers(self.dense[0], self.weights.scaled) if arguments.peers else {}

    @torch.no_grad()
    def measure(self, m: int, seconds: float) -> dict[str, Any]:
        """Milliseconds of the dense product and of each other one, with its speedup: above 1 is faster than dense."""
        expectation = Expectation(self.weights.tokens(m), self.weights)
        entrants = {"dense": dense_entrant(self.dense, expectation)}
        entrants |= {name: entrant_of(ENGINES[name], copies, expectation) for name, copies in self.packed.items()}
        if m <= 16:
            entrants |= {name: peer.entrant(expectation.x) for name, peer in self.peers.items()}
        found = contest(entrants, watch_processor, seconds=seconds)
        if wrong := [f"{name} at M = {m}: {result.note}" for name, result in found.items() if result.seconds is None]:
            raise SystemExit("\n".join(wrong))
        took = {name: result.seconds * 1e3 for name, result in found.items()}
        row = {"dense ms": took.pop("dense")}
        for name, milliseconds in took.items():
            row |= {f"{name} ms": milliseconds, f"{name} x": row["dense ms"] / milliseconds}
        return row


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The function and weight with which another library multiplies."""

    call: Callable[[torch.Tensor], torch.Tensor]
    weight: torch.Tensor

    def entrant(self, x: torch.Tensor) -> Entrant:
        expected = x.float() @ self.weight.float().t()
        return Entrant(calls=[partial(self.call, x)], expected=expected, tolerance=BF16_TOLERANCE)


def peers(dense: torch.Tensor, scaled: ScaledTensor) -> dict[str, Peer]:
    """The same layer as a plain FP8 model has it, and as quantized weight-only by torchao, if that is installed."""
    found = {"cast then linear": Peer(call=lambda x: F.linear(x, scaled.data.to(x.dtype)), weight=scaled.data)}
    try:
        from torchao.quantization import Float8WeightOnlyConfig, quantize_
    except ImportError:
        return found
    linear = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False, dtype=dense.dtype)
    linear.weight = torch.nn.Parameter(dense, requires_grad=False)
    quantize_(linear, Float8WeightOnlyConfig())
    return {**found, "torchao": Peer(call=linear, weight=linear.weight.dequantize())}


if __name__ == "__main__":
    main()
