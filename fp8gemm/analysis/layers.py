"""The layers that are measured: each one's dense and FP8 weight, one of which takes the other's place for a while."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode

from ..errors import UnsupportedError
from ..models.batches import Batch
from ..models.filters import Filter, ModuleFilter
from ..models.moments import searches
from ..models.recipe import Options, Recipe
from ..models.selection import Conversion, complain, planned
from ..scaled import FP8GemmOptions, Granularity
from ..weights import FP8Weight, Home
from ..weights.report import report
from ..weights.search import Search
from ..weights.sharding import held, is_distributed
from ..weights.shares import is_split
from ..weights.structure import ITSELF, layer_name
from .tally import ErrorTally, InputTally, saturated_weights


@dataclass(frozen=True)
class Place:
    """One occurrence of a weight: the module that has it, and its name there."""

    module: nn.Module
    parameter: str


@dataclass(eq=False, kw_only=True)
class Layer(ABC):
    """One weight of a model in all its places, and what was found out about it.

    ``runs`` are the modules whose outputs are compared, ``needs`` those whose forward reads the weight at all.
    """

    name: str
    ties: tuple[str, ...]
    places: tuple[Place, ...]
    shape: tuple[int, ...]
    runs: tuple[nn.Module, ...] = ()
    needs: tuple[nn.Module, ...] = ()
    error: ErrorTally = field(default_factory=ErrorTally)
    inputs: InputTally = field(default_factory=InputTally)
    multiplied: bool = False  # whether the model multiplied by the weight, in these modules or elsewhere
    scheme: str = ""
    engine: str = ""
    saturated_weights: float = 0.0
    static: tuple[torch.Tensor, Granularity] | None = None  # the calibrated scale of activations

    @abstractmethod
    def fp8(self) -> AbstractContextManager[object]:
        """Puts the FP8 weight in all places while the block lasts."""

    @abstractmethod
    def dense(self) -> AbstractContextManager[object]:
        """Puts the dense weight in all places while the block lasts, if it is not there during the whole pass."""

    @abstractmethod
    def originals(self) -> AbstractContextManager[object]:
        """Puts the dense weight in all places for a whole pass, if that takes no memory."""

    def reason(self) -> str:
        """Why there is nothing to say about it; empty after it was measured."""
        if self.error.calls:
            return ""
        if self.multiplied:
            return "other code multiplies by its weight, and so it gives no output of its own"
        return "these inputs do not reach it"

    def find_runs(self, owners: Mapping[nn.Module, nn.Module]) -> None:
        """``owners`` are modules that read the weights of others without calling them, by those others."""
        modules = [owners.get(place.module, place.module) for place in self.places]
        products = [module for module in modules if not isinstance(module, nn.Embedding)]
        self.needs, self.runs = tuple(dict.fromkeys(modules)), tuple(dict.fromkeys(products or modules))

    def describe(self, weight: FP8Weight, original: torch.Tensor) -> None:
        """Notes what is the same in every call."""
        home = weight._home
        packed = home.form(weight.dtype)
        assert packed is not None
        self.engine, self.scheme = packed.engine, str(packed.scheme)
        values = original.detach() if home.layout.folded is None else original.detach().contiguous()
        self.saturated_weights = saturated_weights(home.layout.plain(values), home.scaled())
        scheme = home.scheme.at(home.precision)
        if scheme.static and home.input_scale is not None and scheme.activation is not None:
            self.static = home.input_scale, scheme.activation


@dataclass(eq=False, kw_only=True)
class DenseLayer(Layer):
    """A weight that is quantized for each call, and freed after it."""

    step: Conversion
    options: FP8GemmOptions
    search: Search | None = None

    def fp8(self) -> StandingIn:
        with Unobserved():
            weight: Any = self.step.make(self.options, self.search)
            original = self.places[0].module._parameters[self.places[0].parameter]
            if not self.engine and original is not None:
                self.describe(weight, original)
        return StandingIn(self.places, weight)

    def dense(self) -> AbstractContextManager[object]:
        return nullcontext()

    def originals(self) -> AbstractContextManager[object]:
        return nullcontext()


@dataclass(eq=False, kw_only=True)
class PatchedLayer(Layer):
    """A weight in FP8, whose original is kept."""

    weight: FP8Weight

    @property
    def home(self) -> Home:
        return self.weight._home

    def find_runs(self, owners: Mapping[nn.Module, nn.Module]) -> None:
        if self.home.precision != "original":
            super().find_runs(owners)

    def reason(self) -> str:
        if self.home.precision == "original":
            return "it runs on its original at present: call set_precision(model, pattern, 'fp8') first"
        return super().reason()

    @property
    def resident(self) -> bool:
        """Whether the original can take the weight's place without a copy."""
        original = self.home.original
        assert original is not None
        return original.device == self.weight.device and original.dtype == self.weight.dtype

    def fp8(self) -> StandingIn:
        if not self.engine:
            with Unobserved():
                self.describe(self.weight, self.home.values(self.weight.dtype))
        return StandingIn(self.places, self.weight)

    def dense(self) -> AbstractContextManager[object]:
        return nullcontext() if self.resident else self._original()

    def originals(self) -> AbstractContextManager[object]:
        return self._original() if self.resident else nullcontext()

    def _original(self) -> StandingIn:
        return StandingIn(self.places, nn.Parameter(self.home.values(self.weight.dtype), requires_grad=False))


class Unobserved:
    """Within it no dispatch mode sees the operations, so that compiled kernels may run, as they do otherwise.

    Not a generator, which Python would resume when it collects it, after an interrupt before the block.
    """

    def __enter__(self) -> None:
        self.modes = _get_current_dispatch_mode_stack()
        while torch._C._len_torch_dispatch_stack():
            _pop_mode()

    def __exit__(self, *error: object) -> None:
        for mode in self.modes:
            _push_mode(mode)


class StandingIn:
    """Puts a parameter in the places of another while the block lasts; not a generator for the same reason."""

    def __init__(self, places: Sequence[Place], parameter: nn.Parameter | FP8Weight) -> None:
        self.places, self.parameter = places, parameter

    def __enter__(self) -> None:
        self.former = [place.module._parameters[place.parameter] for place in self.places]
        for place in self.places:
            place.module._parameters[place.parameter] = self.parameter  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        for place, one in zip(self.places, self.former, strict=True):
            place.module._parameters[place.parameter] = one


@contextmanager
def uncounted(layers: Sequence[Layer]) -> Iterator[None]:
    """Within it, products with FP8 weights that the model has already are not counted for the report."""
    activities = [layer.home.activity for layer in layers if isinstance(layer, PatchedLayer)]
    before = [copy.deepcopy(vars(activity)) for activity in activities]
    try:
        yield
    finally:
        for activity, counts in zip(activities, before, strict=True):
            vars(activity).update(counts)


def layers_of(
    model: nn.Module, options: Options, module_filter: ModuleFilter | None, inputs: list[Batch]
) -> tuple[list[Layer], dict[str, str]]:
    """The layers to measure, in the order of the model, and why other matrices stay dense.

    Scales and codes that the options search for are found from ``inputs``.

    Raises:
        ValueError: there is nothing to measure, or an original was discarded.
        UnsupportedError: weights are split among processes.
    """
    for name, parameter in model.named_parameters():
        if is_split(parameter) or is_distributed(parameter):
            raise UnsupportedError(f"{name} is split among processes: measure the model before it is split")
    patched = any(isinstance(parameter, FP8Weight) for parameter in model.parameters())
    if patched and options is not None:
        raise ValueError(
            "the model is patched, and its layers are measured as they are: leave options out, or call "
            "disable_fp8_gemm(model) first"
        )
    layers: list[Layer]
    if patched:
        layers = list(_patched(model, module_filter))
        kept = {row.name: row.reason for row in report(model).kept}
    else:
        layers, kept = _dense(model, Recipe.of(options), module_filter, inputs)
    # Its forward hands the weight of out_proj to torch's function.
    owners: dict[nn.Module, nn.Module] = {
        part.out_proj: part for part in model.modules() if isinstance(part, nn.MultiheadAttention)
    }
    for layer in layers:
        layer.find_runs(owners)
    return layers, kept


def _dense(
    model: nn.Module, recipe: Recipe, module_filter: ModuleFilter | None, inputs: list[Batch]
) -> tuple[list[Layer], dict[str, str]]:
    steps, wanted = planned(model, recipe, module_filter, {})
    complain(wanted, steps, model, recipe)
    # Where an original is kept it counts writes, by another class; here it must not change.
    options = replace(recipe.options, fp16_weight_storage="discard", materialize_fp8_on_wrap=True)
    layers: list[Layer] = []
    for step in steps:
        if not step.converts:
            continue
        if step.tensor.is_meta:
            raise ValueError(f"{step.full_name} is on meta: load the model's weights before it is measured")
        layers.append(
            DenseLayer(
                name=step.name or ITSELF,
                ties=tuple(place.name for place in step.ties),
                places=tuple(Place(place.module, place.parameter) for place in step.places),
                shape=step.layout.shape,
                step=step,
                options=options,
            )
        )
    found = searches(model, steps, options, inputs)
    for layer in layers:
        assert isinstance(layer, DenseLayer)
        layer.search = found.get(id(layer.step.tensor))
    return layers, {step.name: step.reason for step in steps if not step.converts}


def _patched(model: nn.Module, module_filter: ModuleFilter | None) -> Iterator[PatchedLayer]:
    found: dict[int, list[tuple[str, Place, FP8Weight]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            weight: Any = held(parameter)
            if isinstance(weight, FP8Weight):
                full = layer_name(prefix, name)
                found.setdefault(id(weight._home), []).append((full, Place(module, name), weight))
    wanted = Filter(module_filter)
    lost, layers = [], []
    for places in found.values():
        if wanted.reason_of_tied([(name, place.module) for name, place, _ in places]):
            continue
        places.sort(key=lambda one: isinstance(one[1].module, nn.Embedding))  # a head before its embedding
        (name, _, weight), *ties = places
        if weight._home.original is None:
            lost.append(name or ITSELF)
        layers.append(
            PatchedLayer(
                name=name or ITSELF,
                ties=tuple(tie for tie, _, _ in ties),
                places=tuple(place for _, place, _ in places),
                shape=tuple(weight._home.layout.shape),
                weight=weight,
            )
        )
    if lost:
        raise ValueError(
            f"there is nothing to compare {', '.join(lost[:3])}{f' and {len(lost) - 3} more' if lost[3:] else ''} "
            "with, as the originals were discarded: measure the model before it is patched, or patch it with "
            "FP8GemmOptions(fp16_weight_storage='keep')"
        )
    if unmatched := wanted.unmatched():
        raise ValueError(f"module_filter pattern {unmatched[0]!r} matches no layer in FP8")
    if not layers:
        raise ValueError("module_filter leaves nothing to measure: it excludes every layer in FP8")
    yield from layers
