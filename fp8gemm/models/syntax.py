"""Classifying single expressions of a forward by their syntax."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence

from ..weights.einsum import letters_of


def is_method(kind: type, name: str) -> bool:
    """Whether a class has a method of this name."""
    return inspect.isfunction(inspect.getattr_static(kind, name, None))


def arguments_of(node: ast.Call, *before: ast.expr) -> dict[int | str, ast.expr]:
    """The arguments of a call, by position or keyword; ``before`` come first, such as the owner of a method."""
    found: dict[int | str, ast.expr] = dict(enumerate((*before, *node.args)))
    return {**found, **{keyword.arg or "**": keyword.value for keyword in node.keywords}}


def one_by_one(targets: Sequence[ast.expr], value: ast.expr) -> list[tuple[ast.expr, Sequence[ast.expr]]]:
    """What is assigned, and to which targets: ``w, b = self.weight, self.bias`` are two values, to one target each."""
    parts = [node.elts for node in (value, *targets) if isinstance(node, (ast.Tuple, ast.List))]
    in_step = len(parts) == 1 + len(targets) and len({len(part) for part in parts}) == 1
    if not in_step or any(isinstance(node, ast.Starred) for part in parts for node in part):
        return [(value, targets)]
    return [(first, list(others)) for first, *others in zip(*parts, strict=True)]


def last_name(node: ast.expr) -> str:
    """The name by which a function is called; empty for an expression without a name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def is_module(node: ast.expr) -> bool:
    """Whether this is the name of a torch module, as in ``torch.matmul``, ``F.linear`` and ``torch.ops.aten.mm``."""
    return (isinstance(node, ast.Name) and node.id in ("torch", "F", "functional", "nn")) or (
        isinstance(node, ast.Attribute)
        and node.attr in ("functional", "linalg", "ops", "aten")
        and is_module(node.value)
    )


def in_groups(name: str, arguments: list[ast.expr]) -> bool:
    """Whether a view may split the rows of a matrix into groups: ``view(groups, -1, K)``, ``unflatten(0, ...)``."""
    if name == "unflatten":
        return len(arguments) == 2 and is_constant(arguments[0], 0)
    return name in ("view", "reshape") and len(arguments) == 3


def is_constant(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value == value


def matrix_letters(equation: str, place: int, *, stacked: bool) -> str | None:
    """Which dimension of a matrix, the operand at ``place``, an einsum contracts: ``"first"`` or ``"last"``; for a
    stack, which of its last two. ``"last"`` may be several dimensions, as in ``ibnd,hnd->ibh``; for ``"first"`` the
    others may be several, as in ``ibh,hnd->ibnd``."""
    letters = letters_of(equation, place)
    if letters is None or "." in letters[0] or len(letters[0]) < 2 + stacked:
        return None
    w, x, y = letters
    stack, matrix = w[:stacked], w[stacked:]
    if stack not in y or (stacked and len(matrix) > 2):
        return None
    first, rest = {matrix[0]}, set(matrix[1:])
    for name, contracted, made in (("last", rest, first), ("first", first, rest)):
        if contracted <= set(x) - set(y) and made <= set(y) - set(x):
            return name
    return None
