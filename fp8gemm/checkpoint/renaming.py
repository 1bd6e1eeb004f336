"""Names that a model has for a checkpoint's tensors: renamed by regular expressions, split by rows, or left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..errors import CheckpointError
from ..formats.rearrange import Tiled
from ..scaled import ScaledTensor
from .conversion import outline
from .read import Checkpoint

if TYPE_CHECKING:
    from .targets import Target


@dataclass(frozen=True)
class Split:
    """A replacement in ``key_mapping`` for a tensor whose rows belong to several tensors of the model, in this order.

    Weights are split together with their scales, without changing a value: scales by row go with their rows, a scale
    of the whole weight becomes one of each part, and blocks that a cut divides become scales by row.

    Attributes:
        into: a replacement for each part.
        sizes: the rows of each part; by default those of the model's tensors.

    Raises:
        ValueError: there is nothing to split into, or another number of sizes.

    Example:
        >>> Split(("to_q", "to_k", "to_v")).into
        ('to_q', 'to_k', 'to_v')
    """

    into: tuple[str, ...]
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.into, str) or not self.into:
            raise ValueError(f"Split.into must be a tuple of replacements, found {self.into!r}")
        if self.sizes is not None and (len(self.sizes) != len(self.into) or min(self.sizes) < 0):
            raise ValueError(f"Split.sizes must be one size for each of {self.into}, found {self.sizes}")


@dataclass(frozen=True)
class Swap:
    """A replacement in ``key_mapping`` for a tensor whose two halves, by rows, are in the other order in the model.

    Such are scale and shift of adaptive norms in the original implementations of SD3 and Flux and in diffusers.

    Example:
        >>> Swap("norm_out.linear").into
        'norm_out.linear'
    """

    into: str


KeyMapping = Mapping[str, "str | Split | Swap | None"]
Rules = Sequence[tuple[re.Pattern[str], "str | Split | Swap | None"]]


def compiled(key_mapping: KeyMapping | None) -> Rules:
    """The rules of a key mapping, in order.

    Raises:
        ValueError: a pattern is no regular expression.
    """
    rules = []
    for pattern, replacement in (key_mapping or {}).items():
        try:
            rules.append((re.compile(pattern), replacement))
        except re.error as error:
            raise ValueError(f"key_mapping has {pattern!r}, which is no regular expression: {error}") from error
    return rules


@dataclass(frozen=True)
class Renamed:
    """What rules make of a name: ``names`` in the model, none if it is left out.

    ``order`` is the index of the first rule that changed it, -1 if none did; ``by`` what splits its tensor.
    """

    names: tuple[str, ...]
    order: int = -1
    by: Split | Swap | None = None


def renamed(name: str, rules: Rules) -> Renamed:
    """``name`` after all rules, each applied to what those before it made.

    Raises:
        ValueError: two rules split it.
    """
    names: tuple[str, ...] = (name,)
    first, by = -1, None
    for order, (pattern, replacement) in enumerate(rules):
        if isinstance(replacement, str):
            new = tuple(pattern.sub(replacement, one) for one in names)
        elif not any(pattern.search(one) for one in names):
            continue
        elif replacement is None:
            return Renamed((), order)
        elif by is not None:
            raise ValueError(f"key_mapping splits {name} twice, by {by} and by {replacement}")
        else:
            by = replacement
            parts = (by.into,) if isinstance(by, Swap) else by.into
            new = tuple(pattern.sub(part, names[0]) for part in parts)
        if first < 0 and (new != names or by is not None):
            first = order
        names = new
    return Renamed(names, first, by)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a checkpoint's tensor as a tensor by itself: those of each of ``spans``, in order."""

    name: str
    source: str
    spans: tuple[tuple[int, int], ...]
    checkpoint: Checkpoint

    @property
    def parts(self) -> list[str]:
        """The checkpoint's names that it is made from."""
        return [self.source]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(stop - start for start, stop in self.spans), *self.checkpoint.shape(self.source)[1:])

    def value(self) -> torch.Tensor | ScaledTensor:
        """The tensor, in FP8 if its source is."""
        whole = self.checkpoint[self.source]
        if isinstance(whole, ScaledTensor):
            return Tiled.of(whole).rows(self.spans).weight()
        rows = [whole[start:stop] for start, stop in self.spans]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def dense(self) -> torch.Tensor | ScaledTensor:
        """The same: no rows have to be dequantized to be taken."""
        return self.value()

    def planned(self) -> Tiled:
        """The FP8 tensor without its bytes, which are on meta; its scales are read."""
        return outline(self.checkpoint, self.source).rows(self.spans).coarse()


@dataclass
class Names:
    """The names of a checkpoint's tensors, and of ``rows`` of them, with those they have in the model.

    ``new[name]`` is the name in the model, and the index of the rule that made it. ``dropped`` are the names that rules
    leave out, ``unknown`` those of split tensors whose parts the model does not have.
    """

    new: dict[str, tuple[str, int]] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def rename(checkpoint: Checkpoint, rules: Rules, wanted: Mapping[str, Target]) -> Names:
    """Applies rules to the names of a checkpoint; ``wanted`` are the tensors of the model.

    Raises:
        CheckpointError: a tensor does not have the rows that it is to be split into.
    """
    found = Names()
    for name in checkpoint:
        one = renamed(name, rules)
        if one.by is None:
            if one.names:
                found.new[name] = (one.names[0], one.order)
            elif name not in checkpoint.stacks:
                found.dropped.append(name)
        elif name in checkpoint.stacks:  # made of tensors that are split themselves
            found.new[name] = (name, -1)
        elif (spans := _spans(checkpoint, name, one, wanted)) is None:
            found.unknown.append(name)
        else:
            for new, own in zip(one.names, spans, strict=True):
                rows = Rows(name=f"{name} (rows of {new})", source=name, spans=own, checkpoint=checkpoint)
                found.rows[rows.name] = rows
                found.new[rows.name] = (new, one.order)
    return found


def _spans(
    checkpoint: Checkpoint, name: str, new: Renamed, wanted: Mapping[str, Target]
) -> list[tuple[tuple[int, int], ...]] | None:
    """The rows of each part; None if its size is unknown."""
    if name in checkpoint.layout.unsupported:
        return [() for _ in new.names]  # refused later, with the reason
    shape = checkpoint.shape(name)
    if not shape or (name in checkpoint.layers and len(shape) != 2):
        raise CheckpointError(f"{name} of shape {list(shape)} cannot be split by rows: only matrices and vectors can")
    rows = shape[0]
    if isinstance(new.by, Swap):
        if rows % 2:
            raise CheckpointError(f"{name} has {rows} rows, which are no two halves")
        return [((rows // 2, rows), (0, rows // 2))]
    sizes = new.by.sizes if new.by is not None and new.by.sizes is not None else _sizes(rows, new.names, wanted)
    if sizes is None:
        return None
    if sum(sizes) != rows or min(sizes) < 0:
        asked = ", ".join(f"{part} ({size} rows)" for part, size in zip(new.names, sizes, strict=True))
        raise CheckpointError(f"{name} of shape {list(shape)} cannot be split into {asked}")
    stops = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [((stop - size, stop),) for size, stop in zip(sizes, stops, strict=True)]


def _sizes(rows: int, names: Iterable[str], wanted: Mapping[str, Target]) -> tuple[int, ...] | None:
    """The rows of the model's tensors; of one that it does not have, what the others leave."""
    known = [wanted[name].tensor.shape[0] if name in wanted and wanted[name].tensor.dim() else None for name in names]
    if known.count(None) > 1:
        return None
    rest = rows - sum(size for size in known if size is not None)
    return tuple(rest if size is None else size for size in known)
