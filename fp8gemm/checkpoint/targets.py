"""Where tensors go in a model: its parameters and buffers as targets, and the checkpoint names assigned to each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import CheckpointError
from .read import Checkpoint

_EXPERTS = re.compile(r"^(?P<stem>.*)\.(?P<block>\w+)\.experts\.(gate_up_proj|down_proj)$")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One name of one parameter or buffer: ``module`` stores it as ``attribute``."""

    name: str
    module: nn.Module
    attribute: str
    tensor: torch.Tensor

    @property
    def is_parameter(self) -> bool:
        return self.attribute in self.module._parameters

    @property
    def is_linear_weight(self) -> bool:
        return isinstance(self.module, nn.Linear) and self.attribute == "weight"

    def put(self, tensor: torch.Tensor) -> None:
        """Replaces the module's tensor with ``tensor``, as a parameter or buffer like before."""
        if self.is_parameter:
            self.module._parameters[self.attribute] = tensor  # type: ignore[assignment]
        else:
            self.module._buffers[self.attribute] = tensor


def targets(model: nn.Module) -> dict[str, Target]:
    """Every name that ``model.state_dict()`` has for a parameter or a buffer."""
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in _own_tensors(module):
            if attribute not in module._non_persistent_buffers_set:
                name = f"{prefix}.{attribute}" if prefix else attribute
                found[name] = Target(name=name, module=module, attribute=attribute, tensor=tensor)
    return found


def transient(model: nn.Module) -> dict[str, Target]:
    """The non-persistent buffers, by name."""
    found = {}
    for prefix, module in model.named_modules():
        for attribute, tensor in _own_tensors(module):
            if attribute in module._non_persistent_buffers_set:
                name = f"{prefix}.{attribute}" if prefix else attribute
                found[name] = Target(name=name, module=module, attribute=attribute, tensor=tensor)
    return found


def groups(found: Iterable[Target]) -> list[list[Target]]:
    """The targets grouped by tensor: those of one group are the same tensor."""
    by_tensor: dict[int, list[Target]] = {}
    for target in found:
        by_tensor.setdefault(id(target.tensor), []).append(target)
    return list(by_tensor.values())


def initialize_transient(model: nn.Module, device: torch.device) -> list[str]:
    """Computes non-persistent buffers that are on meta, as transformers models can; returns the names of the rest.

    A buffer counts as computed if the result does not depend on what it held before: two fills give the same values.
    """
    waiting = [target for target in transient(model).values() if target.tensor.is_meta]
    initialize = getattr(model, "_init_weights", None)
    if not waiting or not callable(initialize):
        return [target.name for target in waiting]
    owners = {id(target.module): target.module for target in waiting}
    results: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for fill in (0, 1):
            for target in waiting:
                target.put(torch.full(target.tensor.shape, fill, dtype=target.tensor.dtype, device=device))
            for module in owners.values():
                initialize(module)
            results.append([target.module._buffers[target.attribute].clone() for target in waiting])  # type: ignore[union-attr]
    left = [target for target, first, second in zip(waiting, *results, strict=True) if not _same(first, second)]
    for target in left:
        target.put(target.tensor)
    return [target.name for target in left]


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.numel() == 0 or torch.equal(first.nan_to_num(), second.nan_to_num())


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield attribute, parameter
    for attribute, buffer in module._buffers.items():
        if buffer is not None:
            yield attribute, buffer


@dataclass
class Assignment:
    """``sources[model name]``: the checkpoint names whose rows are joined there, in order.

    ``unexpected`` are names in the checkpoint without a target in the model.
    """

    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)


def assign(checkpoint: Checkpoint, names: Iterable[str], key_mapping: Mapping[str, str] | None) -> Assignment:
    """Finds the target of every checkpoint name among the model's ``names``.

    ``key_mapping`` (regex -> replacement) is applied in order to canonical names. Several names may become the same
    one: their rows are joined in the order of the patterns that renamed them.

    Raises:
        CheckpointError: two names become the same one without a defined order.
    """
    wanted = set(names)
    rules = [(re.compile(pattern), replacement) for pattern, replacement in (key_mapping or {}).items()]
    renamed = {name: _renamed(name, rules) for name in checkpoint}
    blocks = _blocks({new for new, _ in renamed.values()}, wanted)
    gathered: dict[str, list[tuple[int, str]]] = {}
    unexpected = []
    for name, (new, order) in renamed.items():
        target = new if new in wanted else _moved(new, blocks)
        if target in wanted:
            gathered.setdefault(target, []).append((order, name))
        elif name not in checkpoint.stacks:
            unexpected.append(name)
    assignment = Assignment()
    for target, found in gathered.items():
        assignment.sources[target] = _ordered(target, found)
    for name in checkpoint.spare:
        target, _ = _renamed(name, rules)
        if target in wanted and target not in assignment.sources:
            assignment.sources[target] = (name,)
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
    """The new name, and the index of the first rule that changed it (-1 for none)."""
    first = -1
    for order, (pattern, replacement) in enumerate(rules):
        new = pattern.sub(replacement, name)
        if new != name and first < 0:
            first = order
        name = new
    return name, first


def _blocks(names: set[str], wanted: set[str]) -> dict[str, str]:
    """Prefixes of expert blocks that have another name in the model: ``...block_sparse_moe.`` -> ``...mlp.``."""
    theirs = {match["stem"]: match["block"] for name in names if (match := _EXPERTS.match(name))}
    ours = {match["stem"]: match["block"] for name in wanted if (match := _EXPERTS.match(name))}
    return {
        f"{stem}.{block}.": f"{stem}.{ours[stem]}."
        for stem, block in theirs.items()
        if stem in ours and ours[stem] != block
    }


def _moved(name: str, blocks: Mapping[str, str]) -> str:
    """``name`` with the prefix of its expert block replaced, if it is in one."""
    start = 0
    while blocks and (end := name.find(".", start)) >= 0:
        prefix = name[: end + 1]
        if prefix in blocks:
            return blocks[prefix] + name[end + 1 :]
        start = end + 1
    return name


def _ordered(target: str, found: list[tuple[int, str]]) -> tuple[str, ...]:
    orders = [order for order, _ in found]
    if len(set(orders)) < len(orders):
        raise CheckpointError(
            f"{', '.join(name for _, name in found)} all become {target}, in no defined order; give key_mapping one "
            "pattern for each, in the order in which their rows are joined"
        )
    return tuple(name for _, name in sorted(found))
