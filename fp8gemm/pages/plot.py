"""A scatter plot, with the front of the best points drawn and the chosen one marked.

Positions are in percent of the drawing, so that text and points keep their size on a narrow page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .markup import Html, element
from .numbers import number, ticks

_MANY = 12  # with more points than this, only those on the front and the chosen one have a label
_MOST = 1e300  # beyond this, the width of an axis may overflow


@dataclass(frozen=True, kw_only=True)
class Point:
    """A named point of a plot."""

    name: str
    x: float
    y: float
    chosen: bool = False


@dataclass(frozen=True)
class _Axis:
    """An axis from its first to its last tick."""

    marks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Where ``value`` lies, from 0 to 100."""
        return 100 * (value - self.marks[0]) / (self.marks[-1] - self.marks[0])


def scatter(
    points: Sequence[Point],
    *,
    x: str,
    y: str,
    front: Sequence[str] = (),
    x_text: Callable[[float], str] = number,
    y_text: Callable[[float], str] = number,
    caption: str = "",
) -> Html:
    """A plot of ``points`` with named axes; ``front`` names the points that are joined, from left to right.

    Points that are NaN or infinite (from 1e300) are named below the plot.

    Raises:
        ValueError: ``front`` names a point that is not there, or two points have the same name.

    Example:
        >>> drawn = scatter([Point(name="a", x=1, y=2), Point(name="b", x=2, y=3)], x="MB", y="dB", front=["a", "b"])
        >>> drawn.count("<circle"), drawn.count('class="front"')
        (2, 1)
    """
    names = [point.name for point in points]
    if len(set(names)) < len(names):
        raise ValueError(f"points of a plot need different names, got {sorted(names)}")
    if unknown := [name for name in front if name not in names]:
        raise ValueError(f"the front names {unknown}, which are not points; those are {names}")
    drawn = [point for point in points if abs(point.x) < _MOST and abs(point.y) < _MOST]
    left_out = [f"{point.name} ({x_text(point.x)}, {y_text(point.y)})" for point in points if point not in drawn]
    parts = []
    if drawn:
        across = _Axis(tuple(ticks(min(p.x for p in drawn), max(p.x for p in drawn), most=3)))
        up = _Axis(tuple(ticks(min(p.y for p in drawn), max(p.y for p in drawn))))
        marks = [*_grid(across, up, x, y, x_text, y_text), *_marks(drawn, across, up, set(front))]
        parts.append(element("div", element("svg", *marks, role="img", aria_label=f"{y} over {x}"), class_="plot"))
    if left_out:
        parts.append(element("p", f"Not drawn: {', '.join(left_out)}", class_="faint"))
    return element("figure", *parts, *([element("figcaption", caption)] if caption else []))


def _grid(
    across: _Axis, up: _Axis, x: str, y: str, x_text: Callable[[float], str], y_text: Callable[[float], str]
) -> list[Html]:
    drawn = []
    for value in across.marks:
        at = f"{across.share(value):.4g}%"
        drawn.append(element("line", x1=at, x2=at, y1="0", y2="100%", class_="grid"))
        drawn.append(element("text", x_text(value), x=at, y="100%", dy="18", text_anchor="middle"))
    for value in up.marks:
        at = f"{100 - up.share(value):.4g}%"
        drawn.append(element("line", x1="0", x2="100%", y1=at, y2=at, class_="grid"))
        drawn.append(element("text", y_text(value), x="0", y=at, dx="-8", dy="4", text_anchor="end"))
    drawn.append(element("text", x, x="100%", y="100%", dy="36", text_anchor="end", class_="axis"))
    drawn.append(element("text", y, x="0", y="0", dx="6", dy="16", class_="label axis"))
    return drawn


def _marks(points: Sequence[Point], across: _Axis, up: _Axis, front: set[str]) -> list[Html]:
    where = {point.name: (across.share(point.x), 100 - up.share(point.y)) for point in points}
    joined = sorted(place for name, place in where.items() if name in front)
    drawn = [
        element("line", x1=f"{a:.4g}%", y1=f"{b:.4g}%", x2=f"{c:.4g}%", y2=f"{d:.4g}%", class_="front")
        for (a, b), (c, d) in pairwise(joined)
    ]
    for point in sorted(points, key=lambda point: (point.chosen, point.name in front)):
        kind = "chosen" if point.chosen else "on" if point.name in front else None
        at_x, at_y = (f"{share:.4g}%" for share in where[point.name])
        drawn.append(
            element("circle", element("title", point.name), cx=at_x, cy=at_y, r=7 if point.chosen else 5, class_=kind)
        )
        if kind or len(points) <= _MANY:
            left = where[point.name][0] > 50
            side = {"dx": "-10", "text_anchor": "end"} if left else {"dx": "10", "text_anchor": "start"}
            label = "label chosen" if point.chosen else "label"
            drawn.append(element("text", point.name, x=at_x, y=at_y, dy="-6", class_=label, **side))
    return drawn
