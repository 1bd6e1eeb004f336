"""A tree of named parts with sizes, as nested ``<details>``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .markup import Html, breakable, element
from .numbers import size


@dataclass(frozen=True, kw_only=True)
class Node:
    """A part: ``amount`` is its own size, without ``children``, and ``note`` is shown beside it.

    Example:
        >>> Node(name="a", amount=1, children=(Node(name="b", amount=2),)).total
        3
    """

    name: str
    amount: float = 0
    note: str = ""
    children: tuple[Node, ...] = ()

    @property
    def total(self) -> float:
        """The size with everything below."""
        return self.amount + sum(child.total for child in self.children)


def nest(leaves: Iterable[tuple[str, float, str]], *, separator: str = ".") -> tuple[Node, ...]:
    """A tree from (dotted name, size, note), in the order given; a name may have both a size and parts below it.

    A name with nothing but one part below it is joined with that.

    Example:
        >>> [(node.name, node.total) for node in nest([("a.b", 1, ""), ("c.e", 5, ""), ("a.d", 2, "")])]
        [('a', 3), ('c.e', 5)]
    """
    groups: dict[str, list[tuple[str, float, str]]] = {}
    for name, amount, note in leaves:
        first, _, rest = name.partition(separator)
        groups.setdefault(first, []).append((rest, amount, note))
    return tuple(_group(name, inside, separator) for name, inside in groups.items())


def _group(name: str, inside: list[tuple[str, float, str]], separator: str) -> Node:
    own = [(amount, note) for rest, amount, note in inside if not rest]
    if not own and len(below := nest(inside, separator=separator)) == 1:
        return replace(below[0], name=f"{name}{separator}{below[0].name}")
    return Node(
        name=name,
        amount=sum(amount for amount, _ in own),
        note=", ".join(note for _, note in own if note),
        children=nest([leaf for leaf in inside if leaf[0]], separator=separator),
    )


def tree(nodes: Sequence[Node], *, text: Callable[[float], str] = size, open_levels: int = 1) -> Html:
    """Nested lists that fold; the first ``open_levels`` levels are unfolded.

    Example:
        >>> tree(nest([("a.b", 1000, "FP8"), ("a.c", 1, "")])).count("<details")
        1
    """
    return element("ul", *(_item(node, text, open_levels) for node in nodes), class_="tree")


def _item(node: Node, text: Callable[[float], str], open_levels: int) -> Html:
    line = Html(
        element("span", breakable(node.name), class_="name")
        + element("span", text(node.total), class_="size")
        + (element("span", node.note, class_="note") if node.note else "")
    )
    if not node.children:
        return element("li", line)
    below = element("ul", *(_item(child, text, open_levels - 1) for child in node.children))
    unfolded = "open" if open_levels > 0 else None
    return element("li", element("details", element("summary", line), below, open=unfolded))
