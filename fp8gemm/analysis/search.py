"""Searching for the variant of a model with the fewest bytes that meets a budget, in few runs of the model."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..models.recipe import Treatment
from .roles import Role

Assignment = dict[str, Treatment]
# How often the noise of a layer counts in the order in which layers are tried: those that few others can make up for
# come first. The order costs or saves runs; what is kept is decided by runs alone.
PRIOR: Mapping[Role, float] = {
    "embedder": 4.0,
    "timestep": 4.0,
    "modulation": 4.0,
    "router": 4.0,
    "head": 4.0,
    "final projection": 4.0,
}
# An exchange that takes no more bytes is preferred as if it took this share of the layer's.
_FREE = 0.01


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer in the search.

    ``sizes`` are the bytes of each treatment, in the order of preference; ``noise`` the relative power of the error in
    its output, or what else says how bad each treatment is.
    """

    name: str
    sizes: Mapping[Treatment, int]
    noise: Mapping[Treatment, float]
    role: Role = "other"

    def rank(self, treatment: Treatment) -> int:
        return list(self.sizes).index(treatment)


class Search:
    """``meets`` runs the model and says whether an assignment meets the budget."""

    def __init__(self, layers: Sequence[Layer], start: Assignment, meets: Callable[[Assignment], bool]) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.start, self.meets = start, meets

    def cost(self, assignment: Assignment) -> tuple[int, int]:
        """Bytes, then how far the treatments are from the preferred ones."""
        size = sum(layer.sizes[assignment[name]] for name, layer in self.layers.items())
        return size, sum(layer.rank(assignment[name]) for name, layer in self.layers.items())

    def sequence(self) -> list[Assignment]:
        """The assignments from ``start`` to the most precise one, each with one layer more precise than the last: the
        one with the most noise removed for the bytes that it takes."""
        current, found = dict(self.start), [dict(self.start)]
        waiting = [move for layer in self.layers.values() for move in self._best_move(layer, current[layer.name])]
        heapq.heapify(waiting)
        while waiting:
            *_, name, treatment = heapq.heappop(waiting)
            current[name] = treatment
            found.append(dict(current))
            for move in self._best_move(self.layers[name], treatment):
                heapq.heappush(waiting, move)
        last: Assignment = {name: list(layer.sizes)[-1] for name, layer in self.layers.items()}
        for name in sorted(self.layers, key=lambda name: -PRIOR.get(self.layers[name].role, 1.0)):
            if current[name] != last[name]:
                current[name] = last[name]
                found.append(dict(current))
        return found

    def _best_move(self, layer: Layer, now: Treatment) -> list[tuple[float, float, str, Treatment]]:
        """The exchange that removes the most noise for its bytes, which sorts first; none if none removes any."""
        moves: list[tuple[float, float, str, Treatment]] = []
        prior = PRIOR.get(layer.role, 1.0)
        for treatment in list(layer.sizes)[layer.rank(now) + 1 :]:
            gain = layer.noise[now] - layer.noise[treatment]
            more = max(layer.sizes[treatment] - layer.sizes[now], _FREE * layer.sizes[now])
            if gain > 0:
                moves.append((-gain * prior / more, -prior, layer.name, treatment))
        return sorted(moves)[:1]

    def first_that_meets(self, sequence: Sequence[Assignment]) -> Assignment:
        """By bisection, an assignment that meets the budget though the one before it does not; the first does not, and
        the last does."""
        low, high = 0, len(sequence) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.meets(sequence[middle]) else (middle, high)
        return sequence[high]

    def take_back(self, met: Assignment, order: Sequence[str]) -> Assignment:
        """Gives layers their preferred treatment again as long as the budget is met: several at once, then fewer."""
        current = dict(met)
        left = [name for name in order if current[name] != self.start[name]]
        size = max(len(left) // 2, 1)
        while left:
            part = left[:size]
            trial = {**current, **{name: self.start[name] for name in part}}
            if self.cost(trial) >= self.cost(current):
                left = left[1:]
            elif self.meets(trial):
                current, left, size = trial, left[size:], 2 * size
            elif size > 1:
                size = max(min(size, len(left)) // 2, 1)
            else:
                current, left = self._between(current, part[0]), left[1:]
        return current

    def _between(self, current: Assignment, name: str) -> Assignment:
        """The first treatment of one layer between its preferred and its present one that meets the budget."""
        layer = self.layers[name]
        for treatment in list(layer.sizes)[layer.rank(self.start[name]) + 1 : layer.rank(current[name])]:
            trial = {**current, name: treatment}
            if self.cost(trial) < self.cost(current) and self.meets(trial):
                return trial
        return current


def most_runs(layers: int, candidates: int) -> int:
    """What no search exceeds: one run for the original, one for each candidate, those of the bisection, and while
    layers are taken back, for each the runs that it fails in, plus one for each time that fewer are tried at once."""
    return candidates + 4 + 2 * math.ceil(math.log2(layers * candidates + 1)) + layers * candidates
