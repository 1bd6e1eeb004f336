"""Moving one tensor of a checkpoint into a model's memory, never through anything wider than a part of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..formats import join_rows
from ..numerics import dequantize
from ..scaled import ROW, TENSOR, Granularity, ScaledTensor, Scheme
from .read import Checkpoint
from .targets import Target

# Elements that are widened to float32 at once by a thread: what torch gives one thread. They stay in a core's cache,
# and on one or two cores no parallel region is opened, which costs more than it gains where those are shared.
_PART = 1 << 15


def take(checkpoint: Checkpoint, sources: Sequence[str]) -> torch.Tensor | ScaledTensor:
    """What ``sources`` hold, joined by rows.

    Raises:
        CheckpointError: where they cannot be joined.
    """
    values = [checkpoint[name] for name in sources]
    if len(values) == 1:
        return values[0]
    scaled = [value for value in values if isinstance(value, ScaledTensor)]
    if len(scaled) == len(values):
        return join_rows(scaled)
    return torch.cat([checkpoint.dequantize(name) for name in sources])


def scheme_of(
    checkpoint: Checkpoint, sources: Sequence[str], weight: ScaledTensor
) -> tuple[Scheme, torch.Tensor | None]:
    """The scheme of a layer whose weight was taken from ``sources``, and its static activation scale.

    Of joined layers the largest scale holds: with it no activation saturates that did not before.
    """
    if sources[0] in checkpoint.stacks:
        return _stack_scheme(checkpoint, sources[0], weight), None
    schemes = [checkpoint.layers[name].scheme for name in sources]
    scales = [scale for name in sources if (scale := checkpoint.input_scale(name)) is not None]
    first = schemes[0]
    static = len(scales) == len(sources)
    ue8m0 = all(scheme.scale_format == "ue8m0" for scheme in schemes) and powers_of_two(weight.scale)
    activation = first.activation
    if not static and first.static:
        activation = TENSOR
    scheme = Scheme(
        weight=weight.granularity,
        activation=activation,
        static=static,
        scale_format="ue8m0" if ue8m0 else "float32",
    )
    return scheme, torch.stack(scales).amax() if static else None


def _stack_scheme(checkpoint: Checkpoint, name: str, weight: ScaledTensor) -> Scheme:
    """The scheme of a stack of experts."""
    first = checkpoint.layers[checkpoint.stacks[name].parts[0][0]].scheme
    ue8m0 = first.scale_format == "ue8m0" and powers_of_two(weight.scale)
    return Scheme(
        weight=weight.granularity,
        activation=of_stack(first.activation),
        scale_format="ue8m0" if ue8m0 else "float32",
    )


def of_stack(activation: Granularity | None) -> Granularity | None:
    """Activations of a stack of experts: by token where the file has them static or by tensor.

    Grouped products take no scale of each expert for activations; by token is finer than what was asked.
    """
    return ROW if activation == TENSOR else activation


def powers_of_two(scale: torch.Tensor) -> bool:
    return bool((torch.frexp(scale)[0] == 0.5).all())


def fill(same: Sequence[Target], sources: Sequence[str], checkpoint: Checkpoint, device: torch.device) -> None:
    """Fills one tensor of a model, kept at the targets ``same``, in its own dtype on ``device``."""
    old = same[0].tensor
    made = old.is_meta or old.device != device
    tensor = torch.empty(old.shape, dtype=old.dtype, device=device) if made else old.data
    start = 0
    for name in sources:
        if name in checkpoint.stacks:
            _fill_experts(tensor, checkpoint, name)
            continue
        rows = checkpoint.shape(name)[:1]
        stop = start + (rows[0] if rows else 0)
        _copy(tensor[start:stop] if len(sources) > 1 else tensor, checkpoint[name])
        start = stop
    if made:
        kept = _like(old, tensor)
        for target in same:
            target.put(kept)


def _like(old: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as a parameter like ``old``, with the attributes that were set on it."""
    if not isinstance(old, nn.Parameter):
        return tensor
    parameter = nn.Parameter(tensor, requires_grad=old.requires_grad)
    parameter.__dict__.update(old.__dict__)
    return parameter


def _fill_experts(tensor: torch.Tensor, checkpoint: Checkpoint, name: str) -> None:
    """Fills dense stacked experts ``[E, N, K]`` from per-expert matrices, one at a time."""
    for expert, parts in zip(tensor, checkpoint.stacks[name].parts, strict=True):
        start = 0
        for part in parts:
            stop = start + checkpoint.shape(part)[0]
            _copy(expert[start:stop], checkpoint[part])
            start = stop


def _copy(target: torch.Tensor, value: torch.Tensor | ScaledTensor) -> None:
    """Writes ``value`` into ``target`` of the same shape, rounded once to its dtype."""
    if not isinstance(value, ScaledTensor):
        target.copy_(value)
        return
    if value.data.dim() > 2:
        for index in range(value.data.shape[0]):
            _copy(target[index], ScaledTensor(value.data[index], value.scale[index], value.granularity))
        return
    rows, cols = value.granularity.rows, value.granularity.cols
    n, k = value.shape
    threads = torch.get_num_threads()
    wide = max(1, _PART * (threads if threads > 2 else 1) // max(k, 1))
    # Parts of whole blocks' rows, or of one block's rows: then that block's scales are those of the whole part.
    inside = rows is not None and rows > 1
    step = math.gcd(rows, 1 << (wide.bit_length() - 1)) if rows is not None and inside else wide
    granularity = Granularity(None, cols) if inside else value.granularity
    for start in range(0, n, step):
        stop = min(start + step, n)
        if rows is None:
            scale = value.scale
        else:
            scale = value.scale[start // rows : start // rows + 1] if inside else value.scale[start:stop]
        part = ScaledTensor(value.data[start:stop].to(target.device), scale.to(target.device), granularity)
        target[start:stop] = dequantize(part, target.dtype)
