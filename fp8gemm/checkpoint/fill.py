"""Copies one checkpoint tensor into a model, widening no more than a small part of it at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..formats import join_rows
from ..formats.rearrange import Tiled, interleaved
from ..numerics import dequantize
from ..scaled import ROW, TENSOR, Granularity, ScaledTensor, Scheme
from ..weights.shares import is_split, spread
from .plan import Transfer
from .read import Checkpoint

# Elements that a thread converts to float32 at once: torch's grain size. They stay in a core's cache, and on one or two
# cores torch then opens no parallel region, which costs more than it gains if the cores are shared.
_PART = 1 << 15


def take(checkpoint: Checkpoint, transfer: Transfer) -> torch.Tensor | ScaledTensor:
    """The sources of a transfer, joined along rows; stacks of experts as ``[E, N, K]``, rows as in the model.

    Raises:
        CheckpointError: they cannot be joined.
    """
    sources = transfer.sources
    values = [checkpoint[name] for name in sources]
    if len(values) == 1:
        value = values[0]
        if transfer.turned and sources[0] not in checkpoint.stacks and isinstance(value, ScaledTensor):
            return Tiled.of(value, flipped=True).weight()
        return interleaved(value) if transfer.interleaved and isinstance(value, ScaledTensor) else value
    scaled = [value for value in values if isinstance(value, ScaledTensor)]
    if len(scaled) == len(values):
        return join_rows(scaled)
    return torch.cat([checkpoint.dequantize(name) for name in sources])


def scheme_of(
    checkpoint: Checkpoint, sources: Sequence[str], weight: ScaledTensor
) -> tuple[Scheme, torch.Tensor | None]:
    """The scheme of a layer whose weight was taken from ``sources``, and its static activation scale.

    Joined layers take their largest activation scale: no activation saturates with it that did not before.
    """
    names = [part for name in sources for part in checkpoint.parts(name)]
    if weight.data.dim() > 2:
        return _stack_scheme(checkpoint, names[0], weight), None
    schemes = [checkpoint.layers[name].scheme for name in names]
    scales = [scale for name in names if (scale := checkpoint.input_scale(name)) is not None]
    first = schemes[0]
    static = len(scales) == len(names)
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
    """The scheme of a stack of experts, of which the layer ``name`` is one, or all."""
    first = checkpoint.layers[name].scheme
    ue8m0 = first.scale_format == "ue8m0" and powers_of_two(weight.scale)
    return Scheme(
        weight=weight.granularity,
        activation=of_stack(first.activation),
        scale_format="ue8m0" if ue8m0 else "float32",
    )


def of_stack(activation: Granularity | None) -> Granularity | None:
    """The activation granularity for a stack of experts: per token if the file has static or per-tensor scales.

    Grouped products take no activation scale per expert; per token is finer than what was asked.
    """
    return ROW if activation == TENSOR else activation


def powers_of_two(scale: torch.Tensor) -> bool:
    return bool((torch.frexp(scale)[0] == 0.5).all())


def fill(transfer: Transfer, checkpoint: Checkpoint, device: torch.device) -> None:
    """Fills one tensor of a model, stored at all targets of ``transfer``, in its own dtype on ``device``."""
    same, sources = transfer.targets, transfer.sources
    old = same[0].tensor
    made = is_split(old) or old.is_meta or old.device != device
    tensor = torch.empty(old.shape, dtype=old.dtype, device=device) if made else old.data
    start = 0
    for name in sources:
        if name in checkpoint.stacks:
            _fill_experts(tensor.mT if transfer.turned else tensor, checkpoint, name, transfer.interleaved)
            continue
        rows = checkpoint.shape(name)[:1]
        stop = start + (rows[0] if rows else 0)
        value = checkpoint.derived[name].dense() if name in checkpoint.derived else checkpoint[name]
        _copy(tensor[start:stop] if len(sources) > 1 else tensor, value)
        start = stop
    if made:
        kept = _like(old, tensor)
        for target in same:
            target.put(kept)


def _like(old: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as a parameter like ``old``, with its custom attributes; this rank's part of it if ``old`` is one."""
    parameter = spread(tensor, old) if is_split(old) else nn.Parameter(tensor, requires_grad=old.requires_grad)
    if not isinstance(old, nn.Parameter):
        return parameter.detach() if is_split(old) else tensor
    parameter.__dict__.update(old.__dict__)
    return parameter


def _fill_experts(tensor: torch.Tensor, checkpoint: Checkpoint, name: str, interleaved: bool) -> None:
    """Fills dense stacked experts ``[E, N, K]`` from per-expert matrices, one at a time."""
    for expert, parts in zip(tensor, checkpoint.stacks[name].parts, strict=True):
        start = 0
        for index, part in enumerate(parts):
            stop = start + checkpoint.shape(part)[0]
            _copy(expert[index :: len(parts)] if interleaved else expert[start:stop], checkpoint[part])
            start = stop


def _copy(target: torch.Tensor, value: torch.Tensor | ScaledTensor) -> None:
    """Copies ``value`` into ``target`` of the same shape, rounded once to its dtype."""
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
    # If a block has several rows, each part stays within one row of blocks, whose scales apply to the whole part.
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
