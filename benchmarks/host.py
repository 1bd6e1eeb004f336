"""Microseconds of Python and dispatch in one call of a layer: the overhead of eager mode beside the kernels.

    python benchmarks/host.py [--calls 2000] [--save cpu_host]

FP8 weights of the ``cpu`` engine are compared with dense ones, on one thread and with layers so small that products
take almost no time, in eager mode and in compiled graphs. For the ``triton`` engine, if Triton is installed, everything
is timed except the launches themselves, which need a GPU: kernels count as compiled, and launching one does nothing. A
"bound" call has a shape that the layer has seen before, a "first" one a new shape.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from harness import save, table
from torch import nn

from fp8gemm import FP8GemmOptions, FP8Linear, enable_fp8_gemm
from fp8gemm.engines.triton.engine import TritonEngine
from fp8gemm.engines.triton.plan import place

BF16 = torch.bfloat16
TOKENS = (1, 16, 64)
LAYERS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="of each measurement, the fastest of seven counts")
    parser.add_argument("--save", help="write benchmarks/results/SAVE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = beside_dense(arguments.calls) + compiled(arguments.calls)
    if find_spec("triton") is not None:
        with torch.inference_mode(), without_launches():
            rows += timed("triton", 28672, 4096, list(TOKENS), arguments.calls)
    print(table(rows, list(rows[0])))
    if arguments.save:
        print(save(arguments.save, rows))


def beside_dense(calls: int) -> list[dict[str, Any]]:
    """Operations on a layer or its weight, in FP8 and dense, in turn."""
    dense = nn.Linear(64, 96, dtype=BF16)
    fp8 = FP8Linear.from_linear(dense, FP8GemmOptions(engine="cpu"))
    x = torch.randn(1, 64, dtype=BF16)
    wants = x.clone().requires_grad_()
    cases: list[tuple[str, Callable[[nn.Linear], object]]] = [
        ("layer(x), bound", lambda layer: layer(x)),
        ("layer.weight", lambda layer: layer.weight),
        ("F.linear(x, layer.weight, bias)", lambda layer: F.linear(x, layer.weight, layer.bias)),
        ("x @ layer.weight.T", lambda layer: x @ layer.weight.T),
        ("forward and backward", lambda layer: layer(wants).sum().backward()),
    ]
    rows = []
    for name, act in cases:
        with torch.set_grad_enabled("backward" in name):
            few = calls // 4 if "backward" in name else calls
            found = [microseconds(lambda: act(layer), few) for layer in (dense, fp8)]  # noqa: B023
        rows.append(row(f"{name}, 1 x 64 by 96 x 64", 1, found[1], found[0]))
    return rows


def compiled(calls: int) -> list[dict[str, Any]]:
    """One of sixty consecutive small layers, in eager mode and by torch.compile."""
    stacks = [nn.Sequential(*(nn.Linear(64, 64, dtype=BF16) for _ in range(LAYERS))).eval() for _ in range(2)]
    enable_fp8_gemm(stacks[1], options=FP8GemmOptions(engine="cpu"))
    x = torch.randn(2, 64, dtype=BF16)
    rows = []
    with torch.no_grad():
        for how in ("eager", "compiled"):
            ready = [torch.compile(stack, fullgraph=True) if how == "compiled" else stack for stack in stacks]
            found = [microseconds(lambda: stack(x), calls // 20) / LAYERS for stack in ready]  # noqa: B023
            rows.append(row(f"{how}, a layer of {LAYERS} (64 x 64)", 2, found[1], found[0]))
    return rows


def timed(engine: str, n: int, k: int, tokens: list[int], calls: int) -> list[dict[str, Any]]:
    """A layer's calls, bound and not; for a GPU engine everything except the launches."""
    layer = FP8Linear.from_linear(nn.Linear(k, n, dtype=BF16), FP8GemmOptions(engine=engine))
    rows = []
    for m in tokens:
        x = torch.randn(m, k, dtype=BF16)
        for name, call in (("bound", layer), ("first", lambda x: layer._run(x, layer.weight, layer.bias))):
            what = f"FP8Linear {engine} {n} x {k}, {name}, without launches"
            rows.append(row(what, m, microseconds(lambda: call(x), calls), None))  # noqa: B023
    return rows


def row(what: str, m: int, fp8: float, dense: float | None) -> dict[str, Any]:
    beside = {} if dense is None else {"dense us": dense, "x dense": fp8 / dense}
    return {"what": what, "m": m, "us": fp8, **beside}


def microseconds(call: Callable[[], object], calls: int) -> float:
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - start)
    return best / calls * 1e6


class _Compiled(dict[Any, Any]):
    """Every kernel counts as compiled, and does nothing."""

    def get(self, key: Any, default: Any = None) -> _Compiled:
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: None


@contextmanager
def without_launches() -> Iterator[None]:
    """Makes the Triton engine run as if on an H100 whose kernels take no time."""
    from fp8gemm.engines.triton import launch

    hopper = place((9, 0))
    believes = {"place": lambda engine, device: hopper, "rejects": lambda engine, spec, machine: []}
    with mock.patch.multiple(TritonEngine, **believes), mock.patch.object(launch, "_compiled", _Compiled()):
        yield


if __name__ == "__main__":
    main()
