"""Regular expressions that come with a file: matched as ``re.match`` does, in a time that the file cannot stretch.

Python's engine tries one way through a name after another, and a pattern such as ``(a+)+$`` has exponentially many.
Patterns with few ways are left to it. For the others, all ways are followed at once: what matters is only at which
positions of the name each part of a pattern can end, and positions are few, however many ways lead to them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from ..errors import CheckpointError

# What one name may take: a millisecond of Python's engine, or some of the positions here.
_MOST_WAYS = 20_000
_MOST_STEPS = 20_000
_MANY = 1 << 60
# The parser's names for what accepts one character, or none at certain positions.
_SIMPLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT")


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The ``names`` that equal one of ``patterns``, or match, from their start, one that begins with ``re:``.

    Raises:
        CheckpointError: a pattern is no string or no regular expression, or takes too long.
    """
    given = list(patterns)
    if wrong := [pattern for pattern in given if not isinstance(pattern, str)]:
        raise CheckpointError(f"the config's names of modules must be strings, found {wrong[0]!r}")
    equal = set(given)
    expressions = [_expression(pattern[3:]) for pattern in sorted(equal) if pattern.startswith("re:")]
    return [name for name in names if name in equal or any(expression.match(name) for expression in expressions)]


@lru_cache(maxsize=1024)
def _expression(pattern: str) -> _Expression:
    return _Expression(pattern)


class _Expression:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        try:
            self._compiled = re.compile(pattern)
            self._parts = _module("parser").parse(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"the config has the pattern {'re:' + pattern!r:.200}, which is no regular expression: {error}"
            ) from error
        self._simple: dict[int, re.Pattern[str]] = {}

    def match(self, name: str) -> bool:
        if _ways(self._parts, len(name)) <= _MOST_WAYS:
            return self._compiled.match(name) is not None
        return bool(_Positions(self, name).after(self._parts, {0}))

    def simple(self, part: Any) -> re.Pattern[str]:
        """A pattern of one part of this one, so that classes and flags mean what they do in Python's engine."""
        if id(part) not in self._simple:
            alone = _module("parser").SubPattern(self._parts.state, [part])
            self._simple[id(part)] = _module("compiler").compile(alone, self._compiled.flags & ~re.DEBUG)
        return self._simple[id(part)]


def _module(name: str) -> Any:
    """The parser or the compiler of Python's regular expressions, which were modules of their own before 3.11."""
    try:
        return importlib.import_module(f"re._{name}")
    except ModuleNotFoundError:
        return importlib.import_module({"parser": "sre_parse", "compiler": "sre_compile"}[name])


def _ways(parts: Any, length: int) -> int:
    """How many ways through a name of ``length`` there are at most."""
    total = 1
    for kind, value in parts:
        total = min(total * _ways_of(str(kind), value, length), _MANY)
    return total


def _ways_of(kind: str, value: Any, length: int) -> int:
    if kind in _SIMPLE:
        return 1
    if kind == "BRANCH":
        return sum(_ways(branch, length) for branch in value[1])
    if kind == "SUBPATTERN":
        return _ways(value[3], length)
    if kind in ("ASSERT", "ASSERT_NOT"):
        return _ways(value[1], length)
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, body = int(value[0]), int(value[1]), value[2]
        if high <= 1:
            return _ways(body, length) + 1
        # One character or a fixed word, over and over: only how often is open.
        fixed = all(str(kind) in _SIMPLE for kind, _ in body) and body.getwidth()[0] > 0
        return min(high - low, length) + 1 if fixed else _MANY
    return _MANY


class _Positions:
    """Follows an expression through one name by the sets of positions that its parts can reach."""

    def __init__(self, expression: _Expression, name: str) -> None:
        self._expression = expression
        self._name = name
        self._steps = 0

    def after(self, parts: Any, starts: set[int]) -> set[int]:
        """Where ``parts`` can end if they begin at one of ``starts``."""
        for part in parts:
            if not starts:
                break
            self._steps += len(starts)
            if self._steps > _MOST_STEPS:
                raise CheckpointError(
                    f"the config has {self._expression.pattern!r}, which takes too long to match; list the modules"
                )
            starts = self._after_one(part, starts)
        return starts

    def _after_one(self, part: Any, starts: set[int]) -> set[int]:
        kind, value = str(part[0]), part[1]
        if kind in _SIMPLE:
            match = self._expression.simple(part).match
            return {found.end() for at in starts if (found := match(self._name, at))}
        if kind == "BRANCH":
            return {end for branch in value[1] for end in self.after(branch, starts)}
        if kind == "SUBPATTERN" and not value[1] and not value[2]:
            return self.after(value[3], starts)
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._after_repeats(int(value[0]), int(value[1]), value[2], starts)
        if kind in ("ASSERT", "ASSERT_NOT"):
            return {at for at in starts if self._holds(value, at) == (kind == "ASSERT")}
        raise CheckpointError(
            f"the config has {self._expression.pattern!r}, which may take for ever, and has a part ({kind}) that "
            "cannot be followed in another way; list the modules"
        )

    def _after_repeats(self, low: int, high: int, body: Any, starts: set[int]) -> set[int]:
        reached = set(starts) if low == 0 else set()
        for times in range(1, high + 1):
            following = self.after(body, starts)
            if times < low and following == starts:
                return following  # and so after any number of times
            if times >= low:
                following = following - reached
                reached |= following
            if not following:
                break
            starts = following
        return reached

    def _holds(self, value: tuple[int, Any], at: int) -> bool:
        direction, parts = value
        if direction > 0:
            return bool(self.after(parts, {at}))
        start = at - parts.getwidth()[0]  # what looks behind has one width
        return start >= 0 and at in self.after(parts, {start})
