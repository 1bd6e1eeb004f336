"""What ``tune`` found: the recipe, and the variants that were run."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import pages
from ..models.recipe import Recipe, Treatment
from ..text import columns
from ..weights.structure import ITSELF


@dataclass(frozen=True, kw_only=True)
class Point:
    """A variant that was run: the bytes of its weights, its metric, and the recipe that gives it.

    ``met`` says whether it meets the budget, ``finite`` whether all its outputs are finite, and ``assignment`` what
    became of each layer.

    Example:
        >>> Point(bytes=10, value=0.5, met=True, assignment={"a": "row", "b": "row"}, recipe=Recipe()).counts
        '2 row'
    """

    bytes: int
    value: float
    met: bool
    finite: bool = True
    assignment: Mapping[str, Treatment]
    recipe: Recipe

    @property
    def counts(self) -> str:
        """How many layers have each treatment."""
        return ", ".join(f"{count} {name}" for name, count in Counter(self.assignment.values()).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain types; a metric that is not finite is a string."""
        counts = dict(Counter(self.assignment.values()))
        value = self.value if math.isfinite(self.value) else str(self.value)
        recipe = self.recipe.to_dict()
        return {"bytes": self.bytes, "value": value, "met": self.met, "counts": counts, "recipe": recipe}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Which layers to keep or to give another scheme; ``str`` of it is a table.

    Attributes:
        recipe: the variant with the fewest bytes that was found to meet the budget.
        point: what that variant is like.
        points: all variants that were run, and the original, by bytes.
        metric, unit, higher_is_better, budget: how far outputs may be from the original's.
        bytes_before: of the weights of all tuned layers in the original.
        runs: how often the model ran over all inputs, without the runs that measured sensitivities.
        roles: of the tuned layers.
        overflowed: layers whose outputs were not finite, with the treatments that did that.
        kept: why other matrices stay dense.
        notes: what else there is to know.

    Example:
        >>> point = Point(bytes=10, value=0.5, met=True, assignment={"a": "row"}, recipe=Recipe())
        >>> tuning = Tuning(
        ...     recipe=point.recipe, point=point, points=(point,), metric="cosine distance", budget=1, bytes_before=20
        ... )
        >>> tuning.value, tuning.front == (point,)
        (0.5, True)
    """

    recipe: Recipe
    point: Point
    points: tuple[Point, ...]
    metric: str
    unit: str = ""
    higher_is_better: bool = False
    budget: float
    bytes_before: int
    runs: int = 0
    roles: Mapping[str, str] = field(default_factory=dict)
    overflowed: Mapping[str, tuple[Treatment, ...]] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        """The metric of the chosen variant."""
        return self.point.value

    @property
    def front(self) -> tuple[Point, ...]:
        """The points that no other one is better than in bytes or in the metric without being worse in the other."""
        found: list[Point] = []
        sign = -1 if self.higher_is_better else 1
        for point in sorted(self.points, key=lambda one: (one.bytes, sign * one.value)):
            if not found or sign * point.value < sign * found[-1].value:
                found.append(point)
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain Python types."""
        return {
            "recipe": self.recipe.to_dict(),
            "metric": self.metric,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "budget": self.budget,
            "value": self.point.to_dict()["value"],
            "bytes": self.point.bytes,
            "bytes_before": self.bytes_before,
            "runs": self.runs,
            "layers": {
                name: {"treatment": treatment, "role": self.roles.get(name, "")}
                for name, treatment in self.point.assignment.items()
            },
            "overflowed": {name: list(treatments) for name, treatments in self.overflowed.items()},
            "kept": dict(self.kept),
            "notes": list(self.notes),
            "points": [point.to_dict() for point in self.points],
            "front": [self.points.index(point) for point in self.front],
        }

    def __str__(self) -> str:
        limit = f"{'at least' if self.higher_is_better else 'at most'} {self._number(self.budget)}"
        share = self.point.bytes / self.bytes_before if self.bytes_before else 1.0
        lines = [
            f"{self.metric} {self._number(self.value)}, asked for {limit}: {_megabytes(self.point.bytes)} MB, "
            f"{100 * share:.1f} % of the original's {_megabytes(self.bytes_before)} MB, found in {self.runs} runs",
            "",
            *columns([("layer", "role", "treatment"), *self._exceptions()]),
            *self._others(),
            "",
            *columns([("", "MB", self.metric, "layers"), *map(self._cells, self._shown())]),
        ]
        overflowed = [f"{name} overflows with {' and '.join(found)}" for name, found in self.overflowed.items()]
        return "\n".join([*lines, *overflowed, *self.notes])

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """A self-contained page with the variants in a plot; also written to ``path`` if that is given."""
        points = [
            pages.Point(name=str(place), x=point.bytes / 1e6, y=point.value, chosen=point is self.point)
            for place, point in enumerate(self.points)
        ]
        front = [str(self.points.index(point)) for point in self.front if math.isfinite(point.value)]
        y = f"{self.metric}{f' ({self.unit})' if self.unit else ''}"
        layers = [[name, self.roles.get(name, ""), treatment] for name, treatment in self.point.assignment.items()]
        rows = [[str(place), *self._cells(point)[1:]] for place, point in enumerate(self.points)]
        html = pages.page(
            "Tuning",
            *str(self).splitlines()[:1],
            pages.section("Variants", pages.scatter(points, x="MB", y=y, front=front)),
            pages.section("All variants", pages.table(["variant", "MB", self.metric, "layers"], rows)),
            pages.section("Layers", pages.table(["layer", "role", "treatment"], layers)),
            *([pages.section("Notes", *self.notes)] if self.notes else []),
        )
        if path is not None:
            Path(path).write_text(html, encoding="utf-8")
        return html

    def _exceptions(self) -> list[tuple[str, str, str]]:
        scheme = self.recipe.options.scheme
        return [
            (name or ITSELF, self.roles.get(name, ""), treatment)
            for name, treatment in self.point.assignment.items()
            if treatment != scheme
        ]

    def _others(self) -> list[str]:
        others = len(self._exceptions())
        count = len(self.point.assignment) - others
        return [f"{'the other' if others else 'all'} {count}: {self.recipe.options.scheme}"] if count else []

    def _shown(self) -> list[Point]:
        """The front, and the variants in which all layers are treated alike."""
        alike = [point for point in self.points if len(set(point.assignment.values())) == 1]
        return [point for point in self.points if point in self.front or point in alike or point is self.point]

    def _cells(self, point: Point) -> tuple[str, str, str, str]:
        mark = "chosen" if point is self.point else "" if point.met else "over budget"
        return mark, _megabytes(point.bytes), self._number(point.value), point.counts

    def _number(self, value: float) -> str:
        return f"{value:.4g}{f' {self.unit}' if self.unit else ''}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.{2 if size >= 1e7 else 4}f}"
