"""Which names of a checkpoint go to which name of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..errors import CheckpointError
from .read import Checkpoint

_EXPERTS = re.compile(r"^(?P<stem>.*)\.(?P<block>\w+)\.experts\.(gate_up_proj|down_proj)$")


@dataclass
class Assignment:
    """``sources[name of the model]``: the checkpoint's names whose rows follow each other there.

    ``unexpected`` names of the checkpoint have no place in the model.
    """

    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)


def assign(checkpoint: Checkpoint, names: Iterable[str], key_mapping: Mapping[str, str] | None) -> Assignment:
    """Finds for every name of the checkpoint its place among the model's ``names``.

    ``key_mapping`` (regex -> replacement) is applied in its order to canonical names. Several names may become one:
    their rows are joined in the order of the patterns that renamed them.

    Raises:
        CheckpointError: two names become one without an order between them.
    """
    wanted = set(names)
    rules = [(re.compile(pattern), replacement) for pattern, replacement in (key_mapping or {}).items()]
    renamed = {name: _renamed(name, rules) for name in checkpoint}
    blocks = _blocks({new for new, _ in renamed.values()}, wanted)
    gathered: dict[str, list[tuple[int, str]]] = {}
    unexpected = []
    for name, (new, order) in renamed.items():
        place = new if new in wanted else _moved(new, blocks)
        if place in wanted:
            gathered.setdefault(place, []).append((order, name))
        elif name not in checkpoint.stacks:
            unexpected.append(name)
    assignment = Assignment()
    for place, found in gathered.items():
        assignment.sources[place] = _ordered(place, found)
    in_stacks = {
        part
        for sources in assignment.sources.values()
        for source in sources
        if source in checkpoint.stacks
        for parts in checkpoint.stacks[source].parts
        for part in parts
    }
    assignment.unexpected = [name for name in unexpected if name not in in_stacks]
    return assignment


def _renamed(name: str, rules: list[tuple[re.Pattern[str], str]]) -> tuple[str, int]:
    """The new name, and the place of the first rule that changed it (-1 for none)."""
    first = -1
    for order, (pattern, replacement) in enumerate(rules):
        new = pattern.sub(replacement, name)
        if new != name and first < 0:
            first = order
        name = new
    return name, first


def _blocks(names: set[str], wanted: set[str]) -> dict[str, str]:
    """Prefixes of expert blocks that the model calls otherwise: ``...block_sparse_moe.`` -> ``...mlp.``."""
    theirs = {match["stem"]: match["block"] for name in names if (match := _EXPERTS.match(name))}
    ours = {match["stem"]: match["block"] for name in wanted if (match := _EXPERTS.match(name))}
    return {
        f"{stem}.{block}.": f"{stem}.{ours[stem]}."
        for stem, block in theirs.items()
        if stem in ours and ours[stem] != block
    }


def _moved(name: str, blocks: Mapping[str, str]) -> str:
    """``name`` with the prefix of its expert block exchanged, if it is in one."""
    start = 0
    while blocks and (end := name.find(".", start)) >= 0:
        prefix = name[: end + 1]
        if prefix in blocks:
            return blocks[prefix] + name[end + 1 :]
        start = end + 1
    return name


def _ordered(place: str, found: list[tuple[int, str]]) -> tuple[str, ...]:
    orders = [order for order, _ in found]
    if len(set(orders)) < len(orders):
        raise CheckpointError(
            f"{', '.join(name for _, name in found)} all become {place}, in no order; give key_mapping one pattern for "
            "each, in the order in which their rows follow each other"
        )
    return tuple(name for _, name in sorted(found))
