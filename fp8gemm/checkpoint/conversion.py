"""The door to transformers' conversion mapping: which names its models have in checkpoints, and how to convert them.

transformers converts checkpoints while it loads them: it renames keys, stacks experts, splits and joins projections,
and exchanges dimensions. The same list, applied to FP8 bytes and scales, serves its models here; it is looked up only
for models of transformers' own, which have imported it.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, UnsupportedError
from ..formats.rearrange import Tensors, Tiled, rearranged
from ..numerics import dequantize
from ..scaled import ScaledTensor
from .read import Checkpoint


def library_of(module: nn.Module) -> str:
    """The library whose model class ``module`` derives from, empty if none; determined without importing it."""
    known = {("PreTrainedModel", "transformers"), ("ModelMixin", "diffusers"), ("Module", "sentence_transformers")}
    found = {(base.__name__, base.__module__.split(".")[0]) for base in type(module).__mro__} & known
    return found.pop()[1] if found else ""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One conversion of several tensors into several: ``sources[pattern]`` are the names that go in, in order.

    ``first`` is the name of the first result, with a placeholder where a list of experts is numbered.
    """

    converter: Any
    first: str
    model: nn.Module
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    @property
    def operations(self) -> list[Any]:
        return list(self.converter.operations)

    @property
    def kinds(self) -> list[str]:
        return [type(operation).__name__ for operation in self.operations]

    def run(self, take: Callable[[str], torch.Tensor | ScaledTensor | Tiled]) -> Tensors:
        """The results by name: tensors, or ``Tiled`` of FP8 weights, which ``take`` gives as ScaledTensor or ``Tiled``.

        Raises:
            UnsupportedError: an operation cannot be applied to FP8 weights.
            CheckpointError: the tensors do not fit each other.
        """
        values: Tensors = {pattern: [_tiled(take(name)) for name in names] for pattern, names in self.sources.items()}
        everything = [one for ones in values.values() for one in ones]
        if len({isinstance(one, Tiled) for one in everything}) > 1:
            values = {pattern: [_dense(one) for one in ones] for pattern, ones in values.items()}
        try:
            for operation in self.operations:
                values = rearranged(operation, partial(self._call, operation), values)
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.names[0]}: {error}") from None
        except (RuntimeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(
                f"{', '.join(self.names[:3])}{', ...' if len(self.names) > 3 else ''} cannot be converted by "
                f"transformers' {' and '.join(self.kinds)}: {error}"
            ) from error
        full = self.first.replace("*.", "0.")
        prefix, suffix = next(((full.partition(k)[0], full.partition(k)[2]) for k in values if k in full), ("", ""))
        return {prefix + name + suffix: _single(value) for name, value in values.items()}

    def _call(self, operation: Any, given: Tensors) -> Mapping[str, Any]:
        made: Mapping[str, Any] = operation.convert(
            given,
            source_patterns=self.converter.source_patterns,
            target_patterns=self.converter.target_patterns,
            full_layer_name=self.first,
            model=self.model,
            config=self.model.config,
            missing_keys=None,
        )
        return made


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _tiled(value: torch.Tensor | ScaledTensor | Tiled) -> torch.Tensor | Tiled:
    return Tiled.of(value) if isinstance(value, ScaledTensor) else value


def _dense(value: torch.Tensor | Tiled) -> torch.Tensor:
    return dequantize(value.weight(), torch.float32) if isinstance(value, Tiled) else value.to(torch.float32)


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A tensor of a model that is converted from several of a checkpoint, or from one by more than a new name.

    ``keys[name]`` is the checkpoint's name of a source of the conversion.
    """

    name: str
    conversion: Conversion
    checkpoint: Checkpoint
    keys: Mapping[str, str]
    shape: tuple[int, ...]

    @property
    def parts(self) -> list[str]:
        """The checkpoint's names that it is made from."""
        return [self.keys[name] for name in self.conversion.names]

    def value(self) -> torch.Tensor | ScaledTensor:
        """The converted tensor, in FP8 if its sources are.

        Raises:
            UnsupportedError: an operation cannot be applied to FP8 weights.
        """
        made = self.conversion.run(lambda name: self.checkpoint[self.keys[name]])[self.name]
        return made.weight() if isinstance(made, Tiled) else made

    def dense(self) -> torch.Tensor:
        """The converted tensor from dequantized sources, which every operation can be applied to."""
        made: torch.Tensor = self.conversion.run(lambda name: _plain(self.checkpoint, self.keys[name]))[self.name]
        return made

    def planned(self) -> Tiled:
        """The FP8 tensor without its bytes, which are on meta; its scales are read.

        Raises:
            UnsupportedError: an operation cannot be applied to FP8 weights.
        """
        made: Tiled = self.conversion.run(lambda name: outline(self.checkpoint, self.keys[name]))[self.name]
        return made.coarse()


def _plain(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return checkpoint.dequantize(name) if name in checkpoint.layers else checkpoint.read(checkpoint.layout.plain[name])


def outline(checkpoint: Checkpoint, name: str) -> Tiled:
    """An FP8 weight of a checkpoint without its bytes, which are on meta; its scales are read."""
    layer = checkpoint.layers[name]
    outline = torch.empty(layer.shape, dtype=torch.uint8, device="meta")
    sizes = (*(1,) * (len(layer.shape) - 2), layer.granularity.rows or 0, layer.granularity.cols or 0)
    return Tiled(outline, layer.read_scale(checkpoint.read), sizes, layer.dtype, layer.granularity)


def derived(checkpoint: Checkpoint, conversion: Conversion, keys: Mapping[str, str]) -> list[Derived]:
    """Everything that a conversion makes; shapes are unknown, (), where a source cannot be read."""
    names = [keys[name] for name in conversion.names]
    if any(name in checkpoint.layout.unsupported for name in names):
        first = conversion.first
        return [Derived(name=first, conversion=conversion, checkpoint=checkpoint, keys=keys, shape=())]
    made = conversion.run(lambda name: torch.empty(checkpoint.shape(keys[name]), dtype=torch.float32, device="meta"))
    return [
        Derived(name=name, conversion=conversion, checkpoint=checkpoint, keys=keys, shape=tuple(value.shape))
        for name, value in made.items()
    ]


class Mapped:
    """transformers' conversions of one model, in one direction: ``reverse`` leads to the names of checkpoints."""

    def __init__(self, model: Any, *, reverse: bool) -> None:
        from transformers import core_model_loading

        self._loading: Any = core_model_loading
        self.model = model
        self.transforms = _transforms(model, self._loading, reverse=reverse)
        self.reverse = reverse
        self.renamings = [one for one in self.transforms if isinstance(one, self._loading.WeightRenaming)]
        self.converters = [one for one in self.transforms if isinstance(one, self._loading.WeightConverter)]
        self._by_pattern = {pattern: one for one in self.converters for pattern in one.source_patterns}

    def resolve(self, names: Iterable[str], wanted: Mapping[str, Any] | None = None) -> Resolved:
        """Where each of ``names`` goes; of a forward mapping, among the names ``wanted``."""
        found = Resolved()
        for name in sorted(names, key=self._loading.dot_natural_key):
            new, pattern = self._renamed(name, wanted)
            if wanted is not None and new not in wanted:
                continue
            if pattern is None:
                found.renamed.setdefault(new, []).append(name)
                continue
            made = Conversion(converter=self._by_pattern[pattern], first=new, model=self.model)
            found.conversions.setdefault(new, made).sources[pattern].append(name)
        return found

    def renamed(self, name: str) -> str:
        """``name`` by the renamings alone."""
        for one in self.renamings:
            name, _ = one.rename_source_key(name)
        return name

    def _renamed(self, name: str, wanted: Mapping[str, Any] | None) -> tuple[str, str | None]:
        if self.reverse:
            for one in self.converters:
                new, pattern = one.rename_source_key(name)
                if pattern is not None:
                    return new, pattern
            return self.renamed(name), None
        prefix = self.model.base_model_prefix
        rename = self._loading.rename_source_key
        new, pattern = rename(name, self.renamings, self.converters, prefix, wanted)
        if wanted is not None and new not in wanted and name in wanted:
            new, pattern = rename(name, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
        return new, pattern


@dataclass
class Resolved:
    """What becomes of names: those in ``renamed[new]`` become ``new``; ``conversions`` are by their first name."""

    renamed: dict[str, list[str]] = field(default_factory=dict)
    conversions: dict[str, Conversion] = field(default_factory=dict)


def mapped(model: nn.Module, *, reverse: bool = False) -> Mapped | None:
    """transformers' conversions of ``model``; None if it is none of its models, or none are known."""
    if library_of(model) != "transformers" or not hasattr(model, "config"):
        return None
    # Before transformers 5 files have the names of its models.
    if importlib.util.find_spec("transformers.conversion_mapping") is None:
        return None
    return Mapped(model, reverse=reverse)


def patched_for_quantization() -> Mapping[str, Any]:
    """The classes of experts that transformers replaces by lists of layers while it loads a quantized model."""
    from transformers.quantizers import base

    return getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})


def _transforms(model: Any, loading: Any, *, reverse: bool) -> list[Any]:
    from transformers import conversion_mapping as mapping

    if not reverse:
        return list(mapping.get_model_conversion_mapping(model))
    used = getattr(model, "_weight_conversions", None)
    if used is None:
        # A prefix that was not seen in a file is not added, as transformers itself does not.
        known = mapping.get_model_conversion_mapping(model, add_legacy=False)
        used = [one for one in known if not isinstance(one, loading.PrefixChange)]
    return [one.reverse_transform() for one in reversed(used) if getattr(one, "quantization_operation", None) is None]
