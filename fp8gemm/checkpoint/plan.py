"""What of a checkpoint goes where in a model; everything that can be refused is refused here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import CheckpointError
from .read import Checkpoint
from .targets import Assignment, Target, assign, groups, targets, transient


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One tensor of the model, under all its names, and the checkpoint's names that fill it.

    ``fp8`` if the tensor is the weight of a Linear, or a stack of experts, that is to hold the file's bytes.
    """

    targets: tuple[Target, ...]
    sources: tuple[str, ...]
    fp8: bool


@dataclass
class Left:
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def plan_load(
    model: nn.Module, checkpoint: Checkpoint, key_mapping: Mapping[str, str] | None, dequantize: bool, strict: bool
) -> tuple[list[Transfer], Left]:
    """What goes where; everything that can be refused is refused here, before a tensor is touched."""
    found = targets(model)
    assignment = assign(checkpoint, found, key_mapping)
    tie = getattr(model, "tie_weights", None)
    if callable(tie) and any(name not in assignment.sources for name in found):
        tie()
        found = targets(model)
    transfers, missing = _transfers(found, assignment, checkpoint, dequantize)
    left = Left(
        missing=_without(missing, getattr(model, "_keys_to_ignore_on_load_missing", None)),
        unexpected=_unexpected(model, checkpoint, assignment),
    )
    problems = _misfits(transfers, checkpoint)
    if strict:
        problems += _strict_problems(left, checkpoint)
    if problems:
        raise CheckpointError(f"{checkpoint.source.path} does not fit the model:\n" + "\n".join(problems))
    order = {name: index for index, name in enumerate(checkpoint)}
    return sorted(transfers, key=lambda transfer: order[transfer.sources[0]]), left


def _transfers(
    found: Mapping[str, Target], assignment: Assignment, checkpoint: Checkpoint, dequantize: bool
) -> tuple[list[Transfer], list[str]]:
    transfers, missing = [], []
    for group in groups(found.values()):
        given = [target for target in group if target.name in assignment.sources]
        if not given:
            missing += [target.name for target in group]
            continue
        if not dequantize and len(group) == 1 and _is_fp8_stack(group[0], assignment, checkpoint):
            transfers.append(Transfer(targets=(group[0],), sources=assignment.sources[group[0].name], fp8=True))
            continue
        # A Linear leaves the tensor that it shares, for FP8 bytes of its own, if the others are given one too.
        leaving = [
            target
            for target in given
            if not dequantize
            and target.is_linear_weight
            and all(name in checkpoint.layers for name in assignment.sources[target.name])
        ]
        modules = {id(target.module) for target in leaving}
        staying = [target for target in group if id(target.module) not in modules]
        dense = [target for target in given if id(target.module) not in modules]
        if staying and not dense:
            leaving, staying, dense = [], group, given
        transfers += [Transfer(targets=(p,), sources=assignment.sources[p.name], fp8=True) for p in _distinct(leaving)]
        for own in _by_source(staying, dense, assignment, checkpoint):
            transfers.append(own)
    return transfers, missing


def _is_fp8_stack(target: Target, assignment: Assignment, checkpoint: Checkpoint) -> bool:
    """Whether a parameter ``[E, N, K]`` is filled by one stack of which every expert is FP8 in the file."""
    sources = assignment.sources[target.name]
    if not target.is_parameter or target.tensor.dim() != 3 or len(sources) != 1 or sources[0] not in checkpoint.stacks:
        return False
    parts = checkpoint.stacks[sources[0]].parts
    return all(name in checkpoint.layers for names in parts for name in names)


def _distinct(leaving: Sequence[Target]) -> list[Target]:
    """One target of each module: a module that is used under two names is filled once."""
    return list({id(target.module): target for target in reversed(leaving)}.values())


def _by_source(
    staying: Sequence[Target], dense: Sequence[Target], assignment: Assignment, checkpoint: Checkpoint
) -> list[Transfer]:
    """One transfer for a shared tensor; where the file has different values for its names, an error."""
    if not dense:
        return []
    first = assignment.sources[dense[0].name]
    for target in dense[1:]:
        other = assignment.sources[target.name]
        if other != first and not torch.equal(_values(checkpoint, other), _values(checkpoint, first)):
            raise CheckpointError(
                f"{target.name} and {dense[0].name} are one tensor in the model but differ in the checkpoint; build "
                "the model with them apart (tie_word_embeddings=False)"
            )
    return [Transfer(targets=tuple(staying), sources=first, fp8=False)]


def _values(checkpoint: Checkpoint, names: Sequence[str]) -> torch.Tensor:
    return torch.cat([checkpoint.dequantize(name) for name in names])


def _misfits(transfers: Sequence[Transfer], checkpoint: Checkpoint) -> list[str]:
    problems = []
    for transfer in transfers:
        target = transfer.targets[0]
        unsupported = [name for name in transfer.sources if name in checkpoint.layout.unsupported]
        if unsupported:
            problems += [f"{name}: {checkpoint.layout.unsupported[name]}" for name in unsupported]
            continue
        shapes = [checkpoint.shape(name) for name in transfer.sources]
        joined = shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if joined != tuple(target.tensor.shape):
            problems.append(f"{target.name}: the file has {list(joined)}, the model {list(target.tensor.shape)}")
    return problems


def _unexpected(model: nn.Module, checkpoint: Checkpoint, assignment: Assignment) -> list[str]:
    """Names without a target, but for those that the model ignores, computes itself, or that are another model's."""
    left = _without(assignment.unexpected, getattr(model, "_keys_to_ignore_on_load_unexpected", None))
    computed = set(transient(model))
    return [name for name in left if name not in computed and not checkpoint.is_foreign(name)]


def _strict_problems(left: Left, checkpoint: Checkpoint) -> list[str]:
    unknown = [name for name in left.unexpected if checkpoint.layout.plain.get(name) in checkpoint.layout.unknown]
    others = [name for name in left.unexpected if name not in unknown]
    problems = []
    if left.missing:
        problems.append(f"not in the checkpoint: {some(left.missing)}")
    if others:
        problems.append(f"not in the model: {some(others)}")
    if unknown:
        problems.append(f"scales of no weight that is known: {some(unknown)}")
    if problems:
        problems.append("key_mapping={regex: replacement} renames the checkpoint's; strict=False loads what fits")
    return problems


def holds_fp8(checkpoint: Checkpoint, transfer: Transfer) -> bool:
    return any(
        part in checkpoint.layers
        for name in transfer.sources
        for part in (
            [p for parts in checkpoint.stacks[name].parts for p in parts] if name in checkpoint.stacks else [name]
        )
    )


def nbytes(checkpoint: Checkpoint, name: str) -> int:
    if name in checkpoint.stacks:
        return sum(nbytes(checkpoint, part) for parts in checkpoint.stacks[name].parts for part in parts)
    if (layer := checkpoint.layers.get(name)) is not None:
        return layer.nbytes
    key = checkpoint.layout.plain.get(name)
    return 0 if key is None else checkpoint.contents.tensors[key].nbytes


def _without(names: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())]


def some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown
