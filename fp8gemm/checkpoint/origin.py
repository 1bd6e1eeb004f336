"""The names that a model's tensors had in the checkpoint it was loaded from, under which it is saved again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from ..formats.naming import Slice
from .conversion import Mapped, library_of
from .plan import Transfer
from .read import Checkpoint

_ORIGIN = "_fp8gemm_origin"  # of a model that was loaded: name in the file -> Slice


def remember(
    model: nn.Module, transfers: Sequence[Transfer], checkpoint: Checkpoint, conversions: Mapped | None
) -> None:
    """Keeps with the model how names in its file relate to its own: for transformers' models what that library keeps,
    the conversions that were used; for others, the file's names. Nothing is kept, so that models are saved under their
    own names, for those of diffusers, which reads no others, and where the file's tensors were split."""
    model.__dict__.pop(_ORIGIN, None)
    if conversions is not None:
        used = [one for one in conversions.transforms if one.was_used()]
        if used:
            model.__dict__["_weight_conversions"] = used
        return
    if library_of(model) == "diffusers" or checkpoint.derived:
        return
    slices: dict[str, Slice] = {}
    twice: set[str] = set()
    for transfer in transfers:
        for name, part in _slices(transfer, checkpoint):
            twice |= {name} & slices.keys()
            slices[name] = part
    if not twice and any(name != part.name for name, part in slices.items()):
        model.__dict__[_ORIGIN] = slices


def origin(model: nn.Module) -> Mapping[str, Slice]:
    """By the names in the file that ``model`` was loaded from, the parts of its tensors; empty if it was not."""
    found: Mapping[str, Slice] = model.__dict__.get(_ORIGIN, {})
    return found


def _slices(transfer: Transfer, checkpoint: Checkpoint) -> Iterator[tuple[str, Slice]]:
    own, sources = transfer.targets[0].name, transfer.sources
    if sources[0] in checkpoint.stacks:
        for expert, parts in enumerate(checkpoint.stacks[sources[0]].parts):
            heights = [checkpoint.shape(part)[0] for part in parts]
            for index, (part, height) in enumerate(zip(parts, heights, strict=True)):
                start, step = (index, len(parts)) if transfer.interleaved else (sum(heights[:index]), 1)
                stop = sum(heights) if transfer.interleaved else start + height
                yield part, Slice(name=own, expert=expert, start=start, stop=stop, step=step, turned=transfer.turned)
    elif len(sources) == 1:
        yield sources[0], Slice(name=own)
    else:
        start = 0
        for source in sources:
            stop = start + checkpoint.shape(source)[0]
            yield source, Slice(name=own, start=start, stop=stop)
            start = stop
