"""One Linear: ``F.linear`` in the model's dtype against every engine that runs here, paired, medians.

    python benchmarks/linear.py [--shapes 4096x4096,...] [--tokens 1,16,...] [--dtype bfloat16] [--cold MB] ...

Every engine is checked against the reference before it is timed. ``--cold MB`` rotates through a stack of layers whose
dense weights take that much memory, as a real model does; without it one layer stays in the cache.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from harness import paired_seconds, save, table

from fp8gemm import ENGINES, SCHEMES, MatmulSpec, ScaledTensor, Scheme, UnsupportedError, dequantize, probe
from fp8gemm.engines import PackedWeight
from fp8gemm.weights.quantization import quantize_weight


def main() -> None:
    arguments = parse()
    rows = []
    for shape, scheme in itertools.product(arguments.shapes.split(","), arguments.schemes.split(",")):
        n, k = map(int, shape.split("x"))
        layers = Layers(n, k, SCHEMES[scheme], arguments)
        for m in map(int, arguments.tokens.split(",")):
            row = {"n": n, "k": k, "m": m, "scheme": scheme, **measure(layers, m, arguments.seconds)}
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
    """The same layer many times over: dense weights, and the same weights packed by each engine."""

    def __init__(self, n: int, k: int, scheme: Scheme, arguments: argparse.Namespace) -> None:
        dtype: torch.dtype = getattr(torch, arguments.dtype)
        self.n, self.k, self.dtype = n, k, dtype
        size = n * k * dtype.itemsize
        self.count = max(1, -(-arguments.cold * 10**6 // size))
        self.scaled = quantize_weight(torch.randn(n, k) * k**-0.5, scheme.weight)
        dense = dequantize(self.scaled, dtype)
        self.dense = [dense.clone() for _ in range(self.count)]
        self.packed: dict[str, list[PackedWeight]] = {}
        spec = MatmulSpec(scheme=scheme, n=n, k=k, compute_dtype=dtype)
        for name in arguments.engines.split(","):
            reasons = ENGINES[name].rejects(spec, probe("cpu"))
            if reasons:
                print(f"{name}: {'; '.join(reasons)}")
                continue
            copies = [replace_data(self.scaled) for _ in range(self.count)]
            try:
                self.packed[name] = [ENGINES[name].prepare(copy, scheme) for copy in copies]
            except UnsupportedError as error:
                print(f"{name}: {error}")
        self.peers = peers(dense, self.scaled) if arguments.peers else {}


def replace_data(scaled: ScaledTensor) -> ScaledTensor:
    return replace(scaled, data=scaled.data.clone(), scale=scaled.scale.clone())


def peers(dense: torch.Tensor, scaled: ScaledTensor) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The same layer as a plain FP8 model has it, and as torchao's weight-only one-liner makes it where installed."""
    found = {"cast then linear": lambda x: F.linear(x, scaled.data.to(x.dtype))}
    try:
        from torchao.quantization import Float8WeightOnlyConfig, quantize_
    except ImportError:
        return found
    linear = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False, dtype=dense.dtype)
    linear.weight = torch.nn.Parameter(dense, requires_grad=False)
    quantize_(linear, Float8WeightOnlyConfig())
    return {**found, "torchao": linear}


def measure(layers: Layers, m: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of the dense product and of each engine, with its ratio to that: above 1 is faster than dense."""
    x = torch.randn(m, layers.k).to(layers.dtype)
    check(layers, x)

    def rotating(calls: list[Callable[[], object]]) -> Callable[[], object]:
        order: Iterator[Callable[[], object]] = itertools.cycle(calls)
        return lambda: next(order)()

    candidates = {"dense": rotating([lambda w=w: F.linear(x, w) for w in layers.dense])}
    for name, copies in layers.packed.items():
        engine = ENGINES[name]
        candidates[name] = rotating([lambda w=w, e=engine: e.linear(x, w, None, layers.dtype) for w in copies])
    if m <= 16 and layers.peers:
        candidates |= {name: (lambda call=call: call(x)) for name, call in layers.peers.items()}
    medians = paired_seconds(candidates, seconds=seconds)
    result: dict[str, Any] = {"dense ms": medians["dense"] * 1e3}
    for name in candidates:
        if name != "dense":
            result |= {f"{name} ms": medians[name] * 1e3, f"{name} x": medians["dense"] / medians[name]}
    return result


def check(layers: Layers, x: torch.Tensor) -> None:
    """Nothing is timed that is wrong."""
    reference = F.linear(x.double(), dequantize(layers.scaled, torch.float64))
    for name, copies in layers.packed.items():
        y = ENGINES[name].linear(x, copies[0], None, layers.dtype).double()
        error = ((y - reference).norm() / reference.norm()).item()
        if error > ENGINES[name].tolerance:
            raise SystemExit(f"{name} is wrong by {error:.1e} at M = {x.shape[0]}, N = {layers.n}, K = {layers.k}")


if __name__ == "__main__":
    main()
