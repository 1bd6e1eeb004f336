"""Where tensors go in a model: its parameters and buffers as targets, and the checkpoint names assigned to each."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import CheckpointError
from ..formats import Stack
from ..weights.managed import tell
from ..weights.structure import is_concatenated, is_transposed
from .conversion import Conversion, Mapped, derived, library_of
from .read import Checkpoint
from .renaming import Rules, rename, renamed

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
            tell(self.module, self.attribute)
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
    initializers = _initializers(model)
    owners = {id(target.module): target.module for target in waiting}
    left = _computed(model, waiting, list(owners.values()), initializers, device)
    if left:  # some models fill the buffers of modules within them
        paths = {target.name.rsplit(".", depth)[0] for target in left for depth in range(2, target.name.count(".") + 1)}
        outer = [model.get_submodule(path) for path in sorted(paths, key=len, reverse=True)]
        left = _computed(model, left, [*outer, model], initializers, device)
    return [target.name for target in left]


def _computed(
    model: nn.Module,
    waiting: list[Target],
    modules: list[nn.Module],
    initializers: Mapping[int, Callable[[nn.Module], object]],
    device: torch.device,
) -> list[Target]:
    """Initializes ``modules`` to compute the buffers ``waiting``; returns those that it does not compute."""
    results: list[list[torch.Tensor]] = []
    with torch.no_grad(), _left_alone(model):
        for fill in (0, 1):
            for target in waiting:
                target.put(torch.full(target.tensor.shape, fill, dtype=target.tensor.dtype, device=device))
            for module in modules:
                if id(module) in initializers:
                    initializers[id(module)](module)
            results.append([target.module._buffers[target.attribute].clone() for target in waiting])  # type: ignore[union-attr]
    left = [target for target, first, second in zip(waiting, *results, strict=True) if not _same(first, second)]
    for target in left:
        target.put(target.tensor)
    return left


@contextlib.contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Within it, transformers' initialization does not touch tensors that have values already."""
    held = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
    marked = [tensor for tensor in held if not getattr(tensor, "_is_hf_initialized", False)]
    try:
        for tensor in marked:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        yield
    finally:
        for tensor in marked:
            del tensor._is_hf_initialized  # type: ignore[attr-defined]


def _initializers(model: nn.Module) -> dict[int, Callable[[nn.Module], object]]:
    """By the id of a module, the function that initializes it: that of the innermost model that it belongs to."""
    found: dict[int, Callable[[nn.Module], object]] = {}
    for module in model.modules():  # outer modules come first
        initialize = getattr(module, "_init_weights", None)
        if callable(initialize) and (module is model or library_of(module)):
            found.update({id(inner): initialize for inner in module.modules()})
    return found


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

    ``unexpected`` are names in the checkpoint without a target in the model, ``dropped`` those that rules leave out.
    """

    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def assign(
    checkpoint: Checkpoint,
    wanted: Mapping[str, Target],
    rules: Rules,
    conversions: Mapped | None = None,
) -> tuple[Checkpoint, Assignment]:
    """Finds the target of every checkpoint name among those ``wanted`` by the model; the checkpoint is returned with
    the names of what has to be split or converted.

    ``rules`` are applied in order to canonical names. Several names may become the same one: their rows are joined in
    the order of the patterns that renamed them. What they leave is converted as the model's library does, and what
    that does not know is found by structure: experts under any name of their block.

    Raises:
        CheckpointError: two names become the same one without a defined order, or a tensor cannot be split.
    """
    names = rename(checkpoint, rules, wanted)
    checkpoint = checkpoint.with_names({}, names.rows)
    assignment = Assignment(dropped=names.dropped)
    done: set[str] = set()
    if conversions is not None:
        checkpoint, done = _converted(checkpoint, conversions, names.new, wanted, assignment)
    blocks = _blocks({new for new, _ in names.new.values()}, set(wanted))
    gathered: dict[str, list[tuple[int, str]]] = {}
    unexpected = list(names.unknown)
    for name, (new, order) in names.new.items():
        if name in done:
            continue
        if name in checkpoint.stacks:
            new = _by_library(new, conversions, wanted)
        target = new if new in wanted else _moved(new, blocks)
        if target in wanted and target not in assignment.sources:
            gathered.setdefault(target, []).append((order, name))
        elif name not in checkpoint.stacks:
            unexpected.append(name)
    for target, found in gathered.items():
        assignment.sources[target] = _ordered(target, found)
    for name in checkpoint.spare:
        given = renamed(name, rules)
        target = _by_library(given.names[0], conversions, wanted) if given.names and given.by is None else ""
        if target in wanted and target not in assignment.sources:
            assignment.sources[target] = (name,)
    used = {part for sources in assignment.sources.values() for source in sources for part in checkpoint.parts(source)}
    assignment.unexpected = [name for name in unexpected if name not in used]
    return checkpoint, assignment


def _by_library(name: str, conversions: Mapped | None, wanted: Mapping[str, Target]) -> str:
    """``name`` as the library of the model renames it, where that leads to one that is ``wanted``."""
    if conversions is None or name in wanted:
        return name
    return next(iter(conversions.resolve([name], wanted).renamed), name)


def _converted(
    checkpoint: Checkpoint,
    conversions: Mapped,
    renamed: Mapping[str, tuple[str, int]],
    wanted: Mapping[str, Target],
    assignment: Assignment,
) -> tuple[Checkpoint, set[str]]:
    """Assigns what the library of the model renames and converts; returns the names that were, too."""
    counts = Counter(new for new, _ in renamed.values())
    keys = {
        new: name
        for name, (new, order) in renamed.items()
        if name not in checkpoint.stacks
        and name not in checkpoint.derived
        and counts[new] == 1
        and (order < 0 or new not in wanted)
    }
    resolved = conversions.resolve(keys, wanted)
    for target, news in resolved.renamed.items():
        assignment.sources[target] = _ordered(target, [(-1, keys[new]) for new in news])
    stacks, others = {}, {}
    for target, conversion in resolved.conversions.items():
        if (stack := _as_stack(checkpoint, wanted[target], conversion, keys)) is not None:
            stacks[target] = stack
            assignment.sources[target] = (target,)
            continue
        for one in derived(checkpoint, conversion, keys):
            others[one.name] = one
            assignment.sources[one.name] = (one.name,)
    checkpoint = checkpoint.with_names(stacks, others)
    return checkpoint, {
        part for sources in assignment.sources.values() for source in sources for part in checkpoint.parts(source)
    }


def _as_stack(checkpoint: Checkpoint, target: Target, conversion: Conversion, keys: Mapping[str, str]) -> Stack | None:
    """A conversion that only stacks matrices, whose rows may be joined before, as a stack: read one at a time."""
    joins = conversion.kinds in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
    joins &= is_concatenated(target.module) and not is_transposed(target.module, target.attribute)
    lists = [conversion.sources.get(pattern, []) for pattern in conversion.converter.source_patterns]
    if not joins or len({len(names) for names in lists}) != 1:
        return None
    dims = [getattr(operation, "dim", None) for operation in conversion.operations]
    names = [[keys[name] for name in names] for names in lists]
    flat = [name for one in names for name in one if name not in checkpoint.layout.unsupported]
    if dims not in ([0], [0, 1]) or any(len(checkpoint.shape(name)) != 2 for name in flat):
        return None
    return Stack(name=target.name, parts=tuple(zip(*names, strict=True)))


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
