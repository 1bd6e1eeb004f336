"""Stand-ins: random weights with the shapes of a model's, whose products are timed dense and on FP8.

A model's layers read weights that are in the caches only if the whole model is. So a *rehearsal* calls as many
stand-ins as the model has layers, in one round all of them dense and then all on FP8, up to ``COLD_BYTES``, which no
cache holds. The whole model is timed in every round too, so that all three see the same load of the machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..bench.contest import COLD_BYTES
from ..weights import FP8Linear, made
from ..weights.sharding import held
from .profile import Clock, Geometry, Problem

SECONDS = 3.0  # of the measurement
LEAST, MOST = 5, 30  # rounds


@dataclass(frozen=True, kw_only=True)
class Round:
    """The seconds of one forward pass, and those of one call of each problem, dense and on FP8."""

    forward: float
    dense: Mapping[Problem, float]
    fp8: Mapping[Problem, float]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A problem's share of the forward pass in one call, and its time on FP8 relative to dense."""

    share: float
    ratio: float


def costs(rounds: Sequence[Round]) -> dict[Problem, Cost]:
    """The medians over all rounds; within one, everything is compared with what ran at about the same time."""
    return {
        problem: Cost(
            share=statistics.median(one.dense[problem] / one.forward for one in rounds),
            ratio=statistics.median(one.fp8[problem] / one.dense[problem] for one in rounds),
        )
        for problem in rounds[0].dense
    }


@dataclass(frozen=True)
class Pair:
    """A random weight, dense and on FP8: called with activations and settings."""

    dense: Callable[[torch.Tensor, tuple[Any, ...]], object]
    fp8: Callable[[torch.Tensor, tuple[Any, ...]], object]
    engine: str


@dataclass
class Rehearsal:
    """The stand-ins of a model's products, and the calls of each problem."""

    calls: dict[Problem, list[tuple[Pair, torch.Tensor]]] = field(default_factory=dict)
    complete: bool = True  # whether there is one for each of the model's

    @classmethod
    def of(cls, problems: Iterable[Problem], *, most: int = COLD_BYTES) -> Rehearsal:
        """Makes them in the order of the model, as many as take ``most`` bytes dense, but at least one a geometry."""
        found, pools, size = cls(), dict[Geometry, list[Pair]](), 0
        for problem in problems:
            geometry = problem.geometry
            pool, known = pools.setdefault(geometry, []), found.calls.get(problem, [])
            fits = size + geometry.nbytes <= most
            found.complete = found.complete and fits
            if fits or not pool:
                pool.append(pair(geometry))
                size += geometry.nbytes
            elif known:
                continue
            x = known[0][1] if known else _activations(problem)
            found.calls.setdefault(problem, []).append((pool[-1], x))
        return found

    def engine(self, problem: Problem) -> str:
        return self.calls[problem][0][0].engine

    def timed(self, clock: Clock, *, fp8: bool) -> dict[Problem, float]:
        """Seconds of one call of each problem: the mean over its stand-ins."""
        found = {}
        for problem, calls in self.calls.items():
            start = clock()
            for one, x in calls:
                (one.fp8 if fp8 else one.dense)(x, problem.settings)
            found[problem] = (clock() - start) / len(calls)
        return found

    def rounds(self, forward: Callable[[], float], clock: Clock, *, seconds: float = SECONDS) -> Iterator[Round]:
        """Times the model and the stand-ins in turn; ``forward`` runs the model and returns its seconds.

        What fits in the caches is called once before, so that it is found there as in a model that runs repeatedly.
        """
        for _ in range(2):  # at the second call of a shape a layer binds it
            self.timed(clock, fp8=True)
        deadline = time.perf_counter() + seconds
        for turn in range(MOST):
            if self.complete:
                forward()
            took = forward()
            dense, fp8 = (self._pass(clock, fp8=which) for which in (False, True))
            yield Round(forward=took, dense=dense, fp8=fp8)
            if turn + 1 >= LEAST and time.perf_counter() > deadline:
                return

    def _pass(self, clock: Clock, *, fp8: bool) -> dict[Problem, float]:
        if self.complete:
            self.timed(clock, fp8=fp8)
        return self.timed(clock, fp8=fp8)


def _activations(problem: Problem) -> torch.Tensor:
    return torch.randn(problem.x, dtype=torch.float32, device=problem.geometry.device).to(problem.x_dtype)


def pair(geometry: Geometry) -> Pair:
    """A random weight of this geometry, and the FP8 weight that ``enable_fp8_gemm`` would make of it."""
    n, k = geometry.layout.matrix
    dtype, device, owner = geometry.dtype, geometry.device, nn.Module()
    weight = torch.empty(geometry.layout.size, dtype=dtype, device=device).normal_(std=max(k, 1) ** -0.5)
    weight = nn.Parameter(weight, requires_grad=geometry.trains)
    rows = weight.shape[1 if geometry.kind == "convolution" and geometry.layout.turned else 0]
    outputs = n if geometry.kind in ("layer", "linear") else rows
    bias = torch.zeros(outputs, dtype=dtype, device=device) if geometry.bias else None
    if geometry.kind == "layer":
        linear = nn.Linear(k, n, bias=geometry.bias, dtype=geometry.dtype, device="meta")
        linear.weight = weight
        linear.bias = None if bias is None else nn.Parameter(bias, geometry.trains)  # type: ignore[assignment]
        layer = FP8Linear.from_linear(linear, geometry.options)
        return Pair(lambda x, settings: linear(x), lambda x, settings: layer(x), layer.engine or "")
    owner.register_parameter(geometry.parameter, weight)
    fp8 = made(owner, geometry.parameter, geometry.options, layout=geometry.layout)
    run = _FUNCTIONS[geometry.kind]
    turned = geometry.layout.turned
    return Pair(
        lambda x, settings: run(x, weight, bias, turned, settings),
        lambda x, settings: run(x, fp8, bias, turned, settings),
        held(fp8)._home.engine or "",
    )


def _linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, turned: bool, settings: Any) -> object:
    return F.linear(x, w.t() if turned else w, bias)


def _batched(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, turned: bool, settings: Any) -> object:
    return torch.bmm(x, w if turned else w.transpose(1, 2))


def _grouped(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, turned: bool, settings: Any) -> object:
    ends = torch.tensor(settings, dtype=torch.int32, device=x.device)
    return torch._grouped_mm(x, w if turned else w.transpose(1, 2), offs=ends)


def _convolution(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, turned: bool, settings: Any) -> object:
    return torch.convolution(x, w, bias, *settings)


_FUNCTIONS: Mapping[str, Callable[..., object]] = {
    "linear": _linear,
    "batched": _batched,
    "grouped": _grouped,
    "convolution": _convolution,
}
