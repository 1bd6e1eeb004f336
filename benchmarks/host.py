"""Microseconds of Python and dispatch in one call of a layer: what eager mode pays beside the kernels.

    python benchmarks/host.py [--calls 2000] [--save cpu_host]

nn.Linear and FP8Linear of the ``cpu`` engine are timed whole, on one thread and layers so small that their products
take next to nothing. Of the ``triton`` engine, where Triton is installed, everything is timed but the launches
themselves, which need a card: kernels count as compiled, and launching one does nothing. "bound" is a call of a shape
that the layer has seen before, "first" one that it has not.
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
from harness import save, table
from torch import nn

from fp8gemm import FP8GemmOptions, FP8Linear
from fp8gemm.engines.triton.engine import TritonEngine
from fp8gemm.engines.triton.plan import place

BF16 = torch.bfloat16
TOKENS = (1, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="of each measurement, the fastest of seven counts")
    parser.add_argument("--save", help="write benchmarks/results/SAVE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        base = microseconds(nn.Linear(16, 16, dtype=BF16), torch.randn(1, 16, dtype=BF16), arguments.calls)
        rows = [{"layer": "nn.Linear 16 x 16", "m": 1, "how": "whole", "us": base}]
        rows += timed("cpu", 64, 64, [1, 16], arguments.calls, "whole")
        if find_spec("triton") is not None:
            with without_launches():
                rows += timed("triton", 28672, 4096, list(TOKENS), arguments.calls, "without launches")
    for row in rows:
        row["x nn.Linear"] = row["us"] / base
    print(table(rows, list(rows[0])))
    if arguments.save:
        print(save(arguments.save, rows))


def timed(engine: str, n: int, k: int, tokens: list[int], calls: int, how: str) -> list[dict[str, Any]]:
    """A layer's calls, bound and not."""
    layer = FP8Linear.from_linear(nn.Linear(k, n, dtype=BF16), FP8GemmOptions(engine=engine))
    rows = []
    for m in tokens:
        x = torch.randn(m, k, dtype=BF16)
        for name, call in (("bound", layer), ("first", lambda x: layer._run(x, layer.bias))):
            what = f"FP8Linear {engine} {n} x {k}, {name}"
            rows.append({"layer": what, "m": m, "how": how, "us": microseconds(call, x, calls)})
    return rows


def microseconds(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, calls: int) -> float:
    for _ in range(20):
        call(x)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(calls):
            call(x)
        best = min(best, time.perf_counter() - start)
    return best / calls * 1e6


class _Compiled(dict[Any, Any]):
    """Every kernel is compiled already, and does nothing."""

    def get(self, key: Any, default: Any = None) -> _Compiled:
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: None


@contextmanager
def without_launches() -> Iterator[None]:
    """Makes the Triton engine believe in an H100 whose kernels take no time."""
    from fp8gemm.engines.triton import launch

    hopper = place((9, 0))
    believes = {"place": lambda engine, device: hopper, "rejects": lambda engine, spec, machine: []}
    with mock.patch.multiple(TritonEngine, **believes), mock.patch.object(launch, "_compiled", _Compiled()):
        yield


if __name__ == "__main__":
    main()
