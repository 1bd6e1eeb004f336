"""What a saved model consists of: its tensors under the names, and in the shapes, that its checkpoints have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, UnsupportedError
from ..formats import Written, coarsened, slice_rows
from ..formats.naming import Slice, expert_slices, file_name
from ..formats.rearrange import Tiled
from ..numerics import dequantize
from ..scaled import ScaledTensor
from ..weights import FP8Weight
from .conversion import Conversion, Mapped, mapped, patched_for_quantization
from .origin import origin
from .targets import targets

Names = Mapping[str, "FP8Weight | torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of a saved model; FP8 if ``weight`` makes it, else ``dense``.

    ``sources`` are the names in the model of what it is made from, ``owners`` those weights that are FP8. ``plan`` is
    the weight without its bytes, where that is cheaper.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    dense: Callable[[], torch.Tensor] | None = None
    weight: Callable[[], ScaledTensor] | None = None
    plan: Tiled | None = None
    owners: tuple[FP8Weight, ...] = ()

    @property
    def module(self) -> str:
        return self.name.removesuffix("weight").rstrip(".")

    @property
    def input_scale(self) -> torch.Tensor | None:
        """The largest static activation scale of the layers that were joined; None if activations are dynamic."""
        scales = [owner._home.input_scale for owner in self.owners]
        given = [scale for scale in scales if scale is not None]
        return torch.stack([scale.flatten() for scale in given]).amax(0) if len(given) == len(scales) > 0 else None

    def written(self) -> Written:
        """What a format is told of an FP8 part."""
        assert self.weight is not None
        home = self.owners[0]._home
        given = self.plan or self.weight()
        input_scale = self.input_scale
        static = home.scheme.static and input_scale is not None
        scales = [given.scale.flatten(), *([input_scale.flatten()] if static and input_scale is not None else [])]
        return Written(
            scheme=replace(home.scheme, weight=given.granularity, static=static),
            shape=self.shape,
            dtype=given.dtype if isinstance(given, Tiled) else given.data.dtype,
            scale_dtype=narrowest_exact(torch.cat(scales), self.dtype),
        )


def narrowest_exact(scale: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """``dtype`` if it holds float32 ``scale`` exactly, else float32: llm-compressor's scales have the model's dtype."""
    exact = dtype in (torch.bfloat16, torch.float16) and torch.equal(scale.to(dtype).to(torch.float32), scale)
    return dtype if exact else torch.float32


def parts(model: nn.Module, tensors: Names, linears: set[str], kind: str, method: str) -> list[list[Part]]:
    """The parts of ``model``, which has these tensors; those of one list are made together.

    Models of transformers get the names of its conversion mapping, others those that they were loaded from, and
    stacks of experts of neither the names of single experts. ``linears`` are the FP8 weights that readers take in FP8.
    ``kind`` is the config's model type, ``method`` the quantization's name in transformers.
    """
    conversions = mapped(model, reverse=True)
    if conversions is None:
        return [[part] for part in _by_slices(tensors, linears, _slices(model, tensors, kind), kind)]
    unstacked = _unstacked(model, tensors, method)
    apart = {part.name for part in unstacked.values()}
    rest = {name: tensor for name, tensor in tensors.items() if name not in apart}
    experts = _by_slices({name: tensors[name] for name in apart}, linears, unstacked, "")
    return [*_converted(conversions, rest, linears), *([part] for part in experts)]


# --- by the names of a file, or of single experts --------------------------------------------------------------------


def _slices(model: nn.Module, tensors: Names, kind: str) -> dict[str, Slice]:
    known = {name: part for name, part in origin(model).items() if part.name in tensors}
    named = {part.name for part in known.values()}
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if not (isinstance(tensor, FP8Weight) and tensor._home.layout.turned)
    }
    structural = expert_slices({name: shape for name, shape in shapes.items() if name not in named}, kind)
    return {**known, **structural}


def _by_slices(tensors: Names, linears: set[str], slices: Mapping[str, Slice], kind: str) -> Iterator[Part]:
    sliced = {part.name for part in slices.values()}
    wholes = {file_name(name, kind): Slice(name=name) for name in tensors if name not in sliced}
    for name, part in {**wholes, **slices}.items():
        tensor = tensors[part.name]
        if isinstance(tensor, FP8Weight) and f".{name}".endswith(".weight") and _is_matrix(tensor, part, linears):
            weight = partial(_slice, tensor, part)
            shape = part.shape(tuple(tensor.shape))
            yield Part(
                name=name, sources=(part.name,), shape=shape, dtype=tensor.dtype, weight=weight, owners=(tensor,)
            )
        else:
            yield _dense(name, tensor, part)


def _is_matrix(weight: FP8Weight, part: Slice, linears: set[str]) -> bool:
    stack = weight.dim() == 3 and weight._home.layout.folded is None
    return stack if part.expert is not None else part.name in linears


def _slice(weight: FP8Weight, part: Slice) -> ScaledTensor:
    """Part of an FP8 weight ``[(E,) N, K]``."""
    whole = weight._home.scaled()
    if part.expert is not None:
        whole = ScaledTensor(whole.data[part.expert], whole.scale[part.expert], whole.granularity)
    if part.stop is None:
        return whole
    if part.step > 1:
        tiles = Tiled.of(whole).spread(0)
        rows = slice(part.start, part.stop, part.step)
        return replace(tiles, data=tiles.data[rows], scale=tiles.scale[rows]).weight()
    return coarsened(slice_rows(whole, part.start, part.stop))


def _dense(name: str, tensor: FP8Weight | torch.Tensor, part: Slice) -> Part:
    shape = part.shape(tuple(tensor.shape))
    dense = partial(_part_of, tensor, part)
    return Part(name=name, sources=(part.name,), shape=shape, dtype=tensor.dtype, dense=dense)


def _part_of(tensor: FP8Weight | torch.Tensor, part: Slice) -> torch.Tensor:
    return part.of(_written(tensor))


def values(tensor: FP8Weight | torch.Tensor) -> torch.Tensor:
    """A tensor of a model; an FP8 weight by its original where that is kept, else dequantized."""
    if not isinstance(tensor, FP8Weight):
        return tensor.detach()
    home = tensor._home
    exact = home.original is not None and home.dense is None and home.original.dtype == tensor.dtype
    return home.original.detach() if exact and home.original is not None else tensor.dequantize()


def _written(tensor: FP8Weight | torch.Tensor) -> torch.Tensor:
    """``values``, but what an FP8 weight stands for where rounding the original would not give its bytes again."""
    home = tensor._home if isinstance(tensor, FP8Weight) else None
    again = home is None or home.search is None or home.search.repeats
    return values(tensor) if again else tensor.dequantize()


def _unstacked(model: nn.Module, tensors: Names, method: str) -> dict[str, Slice]:
    """The experts that transformers has as single layers, not as stacks, while it loads a quantized model."""
    table = patched_for_quantization()
    found: dict[str, Slice] = {}
    if not any(isinstance(tensor, FP8Weight) for tensor in tensors.values()):
        return found
    for prefix, module in model.named_modules():
        entry = table.get(type(module).__name__)
        if entry is None or method not in entry["quantization_methods"]:
            continue
        names = [f"{prefix}.{name}" for name in module._parameters]
        shapes = {name: (tensors[name].shape[0], tensors[name].shape[2], tensors[name].shape[1]) for name in names}
        found.update({name: replace(part, turned=True) for name, part in expert_slices(shapes, "").items()})
    return found


# --- by transformers' conversion mapping -----------------------------------------------------------------------------


def _converted(conversions: Mapped, tensors: Names, linears: set[str]) -> Iterator[list[Part]]:
    """The parts by the reverse of transformers' mapping, where the mapping leads from them back to the model; where it
    does not, as for some of its models, by the model's own names, which transformers reads as well.

    Raises:
        UnsupportedError: it would take neither for what it is.
    """
    resolved, forward = conversions.resolve(tensors), Mapped(conversions.model, reverse=False)
    units: list[tuple[list[str], list[list[Part]]]] = []
    for name, olds in resolved.renamed.items():
        units += [([old], [_whole(forward, name, old, tensors, linears)]) for old in olds]
    for conversion in resolved.conversions.values():
        units.append((conversion.names, list(_conversion(conversions, conversion, tensors))))
    back = _Back(forward, (part.name for _, groups in units for group in groups for part in group))
    for olds, groups in units:
        if back.leads(groups, {old: tuple(tensors[old].shape) for old in olds}):
            yield from groups
            continue
        own = [_whole(forward, old, old, tensors, linears) for old in olds]
        alone = _Back(forward, olds)
        if not all(alone.leads([parts], {old: parts[0].shape}) for old, parts in zip(olds, own, strict=True)):
            raise UnsupportedError(
                f"transformers' conversion mapping for {type(conversions.model).__name__} cannot be reversed for "
                f"{', '.join(olds[:3])}: it would load what is saved as another tensor, or not at all"
            )
        yield from own


def _whole(forward: Mapped, name: str, old: str, tensors: Names, linears: set[str]) -> list[Part]:
    """A tensor of the model under another name."""
    # The library renames scales like weights, unless what it renames ends with "weight".
    alike = forward.renamed(f"{name}_scale") == f"{forward.renamed(name)}_scale"
    return list(_by_slices({old: tensors[old]}, linears if alike else set(), {name: Slice(name=old)}, ""))


class _Back:
    """Where transformers' mapping leads from the names in a file."""

    def __init__(self, forward: Mapped, names: Iterable[str]) -> None:
        resolved = forward.resolve(names, targets(forward.model))
        self._renamed = resolved.renamed
        self._conversions = {name: one for one in resolved.conversions.values() for name in one.names}

    def leads(self, groups: list[list[Part]], wanted: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether these parts become just the tensors ``wanted``, in their shapes."""
        shapes = {part.name: part.shape for group in groups for part in group}
        if all(self._renamed.get(old) == [name] for old, name in zip(wanted, shapes, strict=False)):
            return list(shapes.values()) == list(wanted.values())
        found: dict[str, tuple[int, ...]] = {}
        for one in {id(self._conversions.get(name)): self._conversions.get(name) for name in shapes}.values():
            if one is None or not shapes.keys() >= set(one.names):
                return False
            try:
                made = one.run(lambda name: torch.empty(shapes[name], dtype=torch.uint8, device="meta"))
            except (CheckpointError, UnsupportedError):
                return False
            found.update({name: tuple(value.shape) for name, value in made.items()})
        return found == dict(wanted)


def _conversion(conversions: Mapped, conversion: Conversion, tensors: Names) -> Iterator[list[Part]]:
    """The parts that one conversion makes: those of each expert by themselves, where it takes a stack apart."""
    inputs = {name: tensors[name] for name in conversion.names}
    owners = tuple(tensor for tensor in inputs.values() if isinstance(tensor, FP8Weight))
    dtype = next(iter(inputs.values())).dtype
    tiles = conversion.run(lambda name: _outline(inputs[name])) if _is_fp8(conversion, inputs) else {}
    if any(plan.data.dim() != 2 for plan in tiles.values()):
        tiles = {}
    plans = tiles or conversion.run(
        lambda name: torch.empty(inputs[name].shape, dtype=inputs[name].dtype, device="meta")
    )
    ends, count = list(plans), _experts(conversion, inputs)
    for expert in range(count):
        # What one expert alone is made into has the names of the first.
        names = dict(zip(ends[expert::count], ends[::count], strict=True)) if count > 1 else {end: end for end in ends}
        results = _Results(conversion, inputs, None if count == 1 else expert, fp8=bool(tiles))
        yield [
            Part(
                name=conversions.renamed(end),
                sources=tuple(inputs),
                shape=tuple(plan.data.shape),
                dtype=dtype,
                dense=None if isinstance(plan, Tiled) else partial(results.dense, names[end]),
                weight=partial(results.weight, names[end]) if isinstance(plan, Tiled) else None,
                plan=plan.coarse() if isinstance(plan, Tiled) else None,
                owners=owners,
            )
            for end, plan in ((end, plans[end]) for end in names)
        ]


def _is_fp8(conversion: Conversion, inputs: Names) -> bool:
    """Whether readers take what a conversion makes in FP8. transformers does for experts, by the names of weights; of
    other conversions it drops or misplaces the scales."""
    named = all(pattern.endswith(".weight") for pattern in conversion.converter.target_patterns)
    stacks = all(isinstance(one, FP8Weight) and one.dim() == 3 for one in inputs.values())
    return named and stacks and conversion.kinds[-1] == "SplitModulelist"


def _experts(conversion: Conversion, inputs: Names) -> int:
    """How many experts a conversion can be run for one at a time; 1 if it has to be run for all at once."""
    *before, last = conversion.operations
    apart = conversion.kinds[-1] == "SplitModulelist" and last.dim == 0 and len(inputs) == 1
    if not apart or any(type(one).__name__ != "Chunk" or one.dim == 0 for one in before):
        return 1
    return next(iter(inputs.values())).shape[0]


def _outline(weight: FP8Weight | torch.Tensor) -> Tiled:
    assert isinstance(weight, FP8Weight)
    tiles = Tiled.of(weight._home.scaled(), flipped=weight._home.layout.turned)
    return replace(tiles, data=torch.empty(tiles.data.shape, dtype=torch.uint8, device="meta"))


class _Results:
    """What a conversion of stacks makes, or of one expert of each; made once for all of its names."""

    def __init__(self, conversion: Conversion, inputs: Names, expert: int | None, *, fp8: bool) -> None:
        self._conversion, self._inputs, self._fp8 = conversion, inputs, fp8
        self._one = slice(None) if expert is None else slice(expert, expert + 1)
        self._all = expert is None
        self._made: dict[str, Any] = {}

    def weight(self, name: str) -> ScaledTensor:
        made: Tiled = self._result(name)
        return made.weight()

    def dense(self, name: str) -> torch.Tensor:
        made: torch.Tensor = self._result(name)
        return made

    def _result(self, name: str) -> Any:
        if name not in self._made:
            self._made = self._conversion.run(self._take)
        return self._made.pop(name)  # not kept once it is written

    def _take(self, source: str) -> torch.Tensor | Tiled:
        tensor = self._inputs[source]
        if not isinstance(tensor, FP8Weight):
            return _written(tensor)[self._one]
        if not self._fp8 and (self._all or tensor._home.original is not None):
            return _written(tensor)[self._one]
        tiles = Tiled.of(tensor._home.scaled(), flipped=tensor._home.layout.turned)
        tiles = replace(tiles, data=tiles.data[self._one], scale=tiles.scale[self._one])
        return tiles if self._fp8 else dequantize(tiles.weight(), tensor.dtype)
