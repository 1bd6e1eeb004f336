"""What a module's code does with one of its parameters, read from the source of its forward without running it.

A parameter that is only multiplied by, or whose rows are only looked up, can be FP8 without being dequantized. If the
source is unavailable or does anything else, the parameter stays dense.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

from .source import Method, Names
from .uses import Uses


def uses(kind: type, parameter: str, *, stacked: bool = False) -> Uses | None:
    """How the forward of a class, including the methods that it calls, uses ``self.<parameter>``.

    ``stacked`` means that the parameter is a stack of matrices. None if there is no source.
    """
    return _read(kind, parameter, stacked)


@cache
def _read(kind: type, parameter: str, stacked: bool) -> Uses | None:
    reader = _Reader(kind, parameter, stacked)
    try:
        reader.method("forward", kind, {})
    except (OSError, TypeError, SyntaxError, RecursionError):
        return None
    return reader.found


class _Reader:
    def __init__(self, kind: type, parameter: str, stacked: bool) -> None:
        self.kind, self.parameter, self.stacked, self.found = kind, parameter, stacked, Uses()
        self.read: set[Any] = set()

    def method(self, name: str, after: type, names: Names, *, above: bool = False) -> None:
        """Reads a method as found on the class ``after``, or with ``above``, on the classes after it in the MRO."""
        order = self.kind.__mro__[self.kind.__mro__.index(after) + above :]
        owner = next((kind for kind in order if name in vars(kind)), None)
        function = None if owner is None else inspect.unwrap(_function(vars(owner)[name]))
        if owner is None or not inspect.isfunction(function):
            if name == "forward":
                raise OSError(f"{self.kind.__name__} has no forward written in Python")
            return
        key = (function, tuple(sorted(names)))
        if key in self.read:
            return
        self.read.add(key)
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)) and tree.args.args:
            Method(self, owner, tree, names).run()


def _function(attribute: Any) -> Callable[..., Any]:
    return attribute.__func__ if isinstance(attribute, (staticmethod, classmethod)) else attribute
