"""Plans which checkpoint tensors go where in a model; everything that can be refused is refused here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import CheckpointError
from ..weights.geometry import swapped
from ..weights.structure import STACK_NAMES, is_concatenated, is_transposed
from .conversion import Mapped
from .guards import companion_problems
from .original import rules_for
from .read import Checkpoint
from .renaming import KeyMapping
from .targets import Assignment, Target, assign, groups, targets, transient


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One tensor of the model, under all its names, and the checkpoint names that fill it.

    ``fp8`` if the tensor is a linear layer's weight or a stack of experts, and is to hold the file's FP8 bytes.
    ``turned`` if it is a stack ``[E, K, N]`` of matrices that are ``[N, K]`` in the file; ``interleaved`` if gate and
    up rows, which are one after the other in the file, alternate in the model.
    """

    targets: tuple[Target, ...]
    sources: tuple[str, ...]
    fp8: bool
    turned: bool = False
    interleaved: bool = False


@dataclass
class Left:
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def plan_load(
    model: nn.Module,
    checkpoint: Checkpoint,
    key_mapping: KeyMapping | None,
    dequantize: bool,
    strict: bool,
    conversions: Mapped | None = None,
) -> tuple[Checkpoint, list[Transfer], Left]:
    """The transfers and what is left over, and the checkpoint with the names that they use; everything that can be
    refused is, before any tensor changes."""
    found = targets(model)
    rules = rules_for(model, checkpoint, key_mapping, found)
    checkpoint, assignment = assign(checkpoint, found, rules, conversions)
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
    read = {part for transfer in transfers for name in transfer.sources for part in checkpoint.parts(name)}
    problems += companion_problems(checkpoint, read, known=read)
    if strict:
        problems += _strict_problems(left, checkpoint)
    left.unexpected += assignment.dropped
    if problems:
        raise CheckpointError(f"{checkpoint.source.path} does not fit the model:\n" + "\n".join(problems))
    order = {name: index for index, name in enumerate(checkpoint)}
    parts = {id(one): checkpoint.parts(one.sources[0])[0] for one in transfers}
    return checkpoint, sorted(transfers, key=lambda one: order.get(parts[id(one)], len(order))), left


def _transfers(
    found: Mapping[str, Target], assignment: Assignment, checkpoint: Checkpoint, dequantize: bool
) -> tuple[list[Transfer], list[str]]:
    transfers, missing = [], []
    for group in groups(found.values()):
        given = [target for target in group if target.name in assignment.sources]
        if not given:
            missing += [target.name for target in group]
            continue
        if len(group) == 1 and (stack := _stack(group[0], assignment, checkpoint, dequantize)) is not None:
            transfers.append(stack)
            continue
        # A linear layer leaves the tensor that it shares, for its own FP8 weight, if the others are filled as well.
        leaving = [
            target
            for target in given
            if not dequantize
            and target.is_linear_weight
            and all(_is_fp8(checkpoint, name) for name in assignment.sources[target.name])
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


def _is_fp8(checkpoint: Checkpoint, name: str) -> bool:
    return all(part in checkpoint.layers for part in checkpoint.parts(name))


def _stack(target: Target, assignment: Assignment, checkpoint: Checkpoint, dequantize: bool) -> Transfer | None:
    """The transfer of a parameter ``[E, N, K]`` that the experts of a file fill, or ``[E, K, N]``; None for others."""
    sources = assignment.sources[target.name]
    if not target.is_parameter or target.tensor.dim() != 3 or len(sources) != 1:
        return None
    source, stacked = sources[0], sources[0] in checkpoint.stacks
    if not stacked and target.attribute not in STACK_NAMES:
        return None
    fp8 = not dequantize and _is_fp8(checkpoint, source)
    turned = is_transposed(target.module, target.attribute)
    parts = len(checkpoint.stacks[source].parts[0]) if stacked else 1
    alternate = parts == 2 and not is_concatenated(target.module)
    return Transfer(targets=(target,), sources=sources, fp8=fp8, turned=turned, interleaved=alternate)


def _distinct(leaving: Sequence[Target]) -> list[Target]:
    """One target per module: a module registered under two names is filled once."""
    return list({id(target.module): target for target in reversed(leaving)}.values())


def _by_source(
    staying: Sequence[Target], dense: Sequence[Target], assignment: Assignment, checkpoint: Checkpoint
) -> list[Transfer]:
    """One transfer for a shared tensor; an error if the file has different values for its names."""
    if not dense:
        return []
    first = assignment.sources[dense[0].name]
    for target in dense[1:]:
        other = assignment.sources[target.name]
        if other != first and not torch.equal(_values(checkpoint, other), _values(checkpoint, first)):
            raise CheckpointError(
                f"{target.name} and {dense[0].name} are one tensor in the model but differ in the checkpoint; build "
                "the model with separate tensors (tie_word_embeddings=False)"
            )
    return [Transfer(targets=tuple(staying), sources=first, fp8=False)]


def _values(checkpoint: Checkpoint, names: Sequence[str]) -> torch.Tensor:
    return torch.cat([checkpoint.dequantize(name) for name in names])


def _misfits(transfers: Sequence[Transfer], checkpoint: Checkpoint) -> list[str]:
    problems = []
    for transfer in transfers:
        target = transfer.targets[0]
        parts = [part for name in transfer.sources for part in checkpoint.parts(name)]
        unsupported = [name for name in parts if name in checkpoint.layout.unsupported]
        if unsupported:
            problems += [f"{name}: {checkpoint.layout.unsupported[name]}" for name in unsupported]
            continue
        shapes = [checkpoint.shape(name) for name in transfer.sources]
        joined = shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if transfer.turned and transfer.sources[0] in checkpoint.stacks:
            joined = swapped(joined, True)
        if joined != tuple(target.tensor.shape):
            problems.append(f"{target.name}: {list(joined)} in the file, {list(target.tensor.shape)} in the model")
    return problems


def _unexpected(model: nn.Module, checkpoint: Checkpoint, assignment: Assignment) -> list[str]:
    """Names without a target, except those that the model ignores or computes, or that belong to another model."""
    left = _without(assignment.unexpected, getattr(model, "_keys_to_ignore_on_load_unexpected", None))
    computed = set(transient(model))
    return [name for name in left if name not in computed and not checkpoint.is_foreign(checkpoint.parts(name)[0])]


def _strict_problems(left: Left, checkpoint: Checkpoint) -> list[str]:
    unknown = [name for name in left.unexpected if checkpoint.layout.plain.get(name) in checkpoint.layout.unknown]
    unsupported = [name for name in left.unexpected if name in checkpoint.layout.unsupported]
    others = [name for name in left.unexpected if name not in unknown and name not in unsupported]
    problems = [f"not in the model: {name}: {checkpoint.layout.unsupported[name]}" for name in unsupported[:12]]
    if left.missing:
        problems.append(f"not in the checkpoint: {some(left.missing)}")
    if others:
        problems.append(f"not in the model: {some(others)}")
    if unknown:
        problems.append(f"scales that belong to no known weight: {some(unknown)}")
    if problems:
        problems.append(
            "key_mapping={regex: replacement} renames checkpoint keys, a Split as replacement divides one among "
            "several; strict=False loads what fits"
        )
    return problems


def holds_fp8(checkpoint: Checkpoint, transfer: Transfer) -> bool:
    return any(part in checkpoint.layers for name in transfer.sources for part in checkpoint.parts(name))


def nbytes(checkpoint: Checkpoint, name: str) -> int:
    if (rows := checkpoint.derived.get(name)) is not None and len(rows.parts) == 1 and rows.parts != [name]:
        whole = math.prod(checkpoint.shape(rows.parts[0]))
        return nbytes(checkpoint, rows.parts[0]) * math.prod(rows.shape) // max(whole, 1)
    if (parts := checkpoint.parts(name)) != [name]:
        return sum(nbytes(checkpoint, part) for part in parts if part != name)
    if (layer := checkpoint.layers.get(name)) is not None:
        return layer.nbytes
    key = checkpoint.layout.plain.get(name)
    return 0 if key is None else checkpoint.contents.tensors[key].nbytes


def _without(names: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())]


def some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown
