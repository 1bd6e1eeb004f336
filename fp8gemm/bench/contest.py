"""Benchmarking several implementations of one product: a *contest* first checks each *entrant*, then times all in turn.

Weights are rotated, so that they are not in the caches. A ``Watch`` prepares the timing of an entrant's calls.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from ..engines import Engine, PackedWeight
from ..engines.reference import ReferenceEngine
from ..numerics import dequantize
from ..scaled import ScaledTensor, Scheme
from ..weights.quantization import quantize_weight

# total size of the FP8 copies that are rotated: more than the L2 cache of any GPU, and of most CPUs
COLD_BYTES = 256 * 2**20
MOST_COPIES = 256
BF16 = torch.bfloat16
# Of F.linear against the float32 product: weight and output are rounded to bfloat16, and perhaps partial sums.
BF16_TOLERANCE = 2**-7

Calls = Sequence[Callable[[], torch.Tensor]]
Watch = Callable[[Calls], Callable[[], float]]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One implementation of a product: a call for each copy of the weight, and the expected result."""

    calls: Calls
    expected: torch.Tensor
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """The relative error, and the seconds of one call; None if it failed or is wrong, for the reason in ``note``."""

    error: float | None = None
    seconds: float | None = None
    note: str = ""


def contest(entrants: Mapping[T, Entrant], watch: Watch, *, seconds: float = 1.0) -> dict[T, Result]:
    """Checks every entrant, then times the correct ones in turn, so that noise affects all of them alike."""
    results: dict[T, Result] = {}
    watches: dict[T, Callable[[], float]] = {}
    for name, entrant in entrants.items():
        try:
            error, worst = errors(entrant.calls[0](), entrant.expected)
            if not (error <= entrant.tolerance and worst <= 4 * entrant.tolerance):
                results[name] = Result(note=f"wrong by {error:.1e}, at worst {worst:.1e} of a row, and so not timed")
                continue
            watches[name] = watch(entrant.calls)
            results[name] = Result(error=error)
        except Exception as failure:  # compilers and drivers fail in many ways; the other entrants still run
            results[name] = Result(note=f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}")
            if entrant.expected.is_cuda:
                torch.cuda.synchronize()  # raises if the GPU is unusable, as nothing could run on it
    return results | {name: replace(results[name], seconds=s) for name, s in medians(watches, seconds=seconds).items()}


def errors(y: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """The relative error of the whole, and that of the worst token or output relative to the mean one; NaN if any is
    NaN."""
    error, size = y.float() - expected, expected.norm()
    m, n = expected.shape
    token, output = error.norm(dim=1).max() * m**0.5, error.norm(dim=0).max() * n**0.5
    return (error.norm() / size).item(), (torch.maximum(token, output) / size).item()


def medians(
    watches: Mapping[T, Callable[[], float]], *, seconds: float, most: int = 50, least: int = 5
) -> dict[T, float]:
    """The median of the results of each watch; the watches run in turn for about ``seconds``."""
    samples: dict[T, list[float]] = {name: [] for name in watches}
    deadline = time.perf_counter() + seconds
    for turn in range(most):
        for name, watch in watches.items():
            samples[name].append(watch())
        if turn + 1 >= least and time.perf_counter() > deadline:
            break
    return {name: statistics.median(values) for name, values in samples.items()}


def watch_processor(calls: Calls, *, least: float = 0.0) -> Callable[[], float]:
    """Seconds of the next call in turn, or of a call among so many that together they take ``least`` seconds."""
    turn = itertools.cycle(calls)
    next(turn)()
    count = 1

    def measure() -> float:
        several = list(itertools.islice(turn, count))
        start = time.perf_counter()
        for call in several:
            call()
        return (time.perf_counter() - start) / count

    if least:
        count = max(1, math.ceil(least / measure()))
    return measure


def watch_card(calls: Calls, device: torch.device, stream: torch.cuda.Stream, pool: Any) -> Callable[[], float]:
    """Seconds per call in a CUDA graph of all calls, between two events: host time does not count."""
    with torch.cuda.device(device):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        count = len(calls) * max(1, 16 // len(calls))
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            for call in itertools.islice(itertools.cycle(calls), count):
                call()
        graph.replay()

    def measure() -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / count

    return measure


def watch_of(device: torch.device) -> Watch:
    """The watch for products on a device; the CUDA graphs of one contest share their memory."""
    if device.type == "cpu":
        return watch_processor
    # Graphs share memory within one stream only.
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return partial(watch_card, device=device, stream=stream, pool=torch.cuda.graph_pool_handle())


class Weights:
    """One random weight for activations of ``dtype``, and the number of its copies: by default more than the caches
    hold."""

    def __init__(
        self,
        n: int,
        k: int,
        scheme: Scheme,
        device: torch.device,
        *,
        dtype: torch.dtype = BF16,
        count: int | None = None,
    ) -> None:
        self.scheme, self.dtype = scheme, dtype
        self.scaled = quantize_weight(torch.randn(n, k, dtype=torch.float32, device=device) * k**-0.5, scheme.weight)
        cold = max(1, min(MOST_COPIES, -(-COLD_BYTES // max(self.scaled.nbytes, 1))))
        self.count = cold if count is None else count

    def packed(self, engine: Engine) -> list[PackedWeight]:
        """The copies, packed by an engine."""
        own = self.scaled
        clones = (ScaledTensor(own.data.clone(), own.scale.clone(), own.granularity) for _ in range(self.count))
        return [engine.prepare(clone, self.scheme) for clone in clones]

    def dense(self) -> list[torch.Tensor]:
        """The same number of copies, dense in ``dtype``."""
        w = dequantize(self.scaled, self.dtype)
        return [w, *(w.clone() for _ in range(self.count - 1))]

    def tokens(self, m: int) -> torch.Tensor:
        """Random activations ``[M, K]``, as zeros run faster."""
        return torch.randn(m, self.scaled.shape[1], dtype=torch.float32, device=self.scaled.device).to(self.dtype)


class Expectation:
    """The float32 products of the operands that an engine multiplies, computed once for each quantization of x."""

    def __init__(self, x: torch.Tensor, weights: Weights) -> None:
        self.x, self.weights = x, weights
        self._known: dict[Scheme, torch.Tensor] = {}

    def under(self, scheme: Scheme) -> torch.Tensor:
        """``x``, quantized as the scheme says, times the dequantized weight."""
        if scheme not in self._known:
            like = ReferenceEngine().prepare(self.weights.scaled, scheme)
            rounded = ReferenceEngine().rounded(self.x, like)
            self._known[scheme] = rounded.float() @ dequantize(self.weights.scaled).t()
        return self._known[scheme]


def dense_entrant(copies: Sequence[torch.Tensor], expectation: Expectation) -> Entrant:
    """torch's own product of dense weights, the baseline of all others."""
    return Entrant(
        calls=[partial(F.linear, expectation.x, w) for w in copies],
        expected=expectation.under(expectation.weights.scheme.weight_only()),
        tolerance=BF16_TOLERANCE,
    )


def entrant_of(engine: Engine, copies: Sequence[PackedWeight], expectation: Expectation) -> Entrant:
    """An engine's product with a packed weight."""
    x = expectation.x
    return Entrant(
        calls=[partial(engine.linear, x, copy, None, x.dtype) for copy in copies],
        expected=expectation.under(engine.rounds(x.shape[0], copies[0])),
        tolerance=engine.tolerance,
    )
