"""Planning: which of a model's matrices will be converted, and why others are not. Nothing is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..engines import choose, probe
from ..errors import UnsupportedError
from ..scaled import COMPUTE_DTYPES, ROW, SCHEMES, FP8GemmOptions, SchemeName
from ..weights import FP8Linear, FP8Weight, made
from ..weights.convert import scheme_for
from ..weights.geometry import Layout
from ..weights.managed import refusal
from ..weights.packed import spec_of
from ..weights.search import Search
from ..weights.sharding import held
from ..weights.shares import is_split
from ..weights.structure import layer_name, routers
from .filters import Filter, ModuleFilter
from .owners import Role, is_plain_linear, role_of
from .recipe import KEPT_BY_RECIPE, ORIGINAL, Options, Recipe, no_layer


@dataclass(frozen=True)
class Holder:
    """One occurrence of a parameter: its module, its name there, and its ``Role`` in that module."""

    name: str  # of the layer: the module's name, or the parameter's if that is not "weight"
    module: nn.Module
    parameter: str
    role: Role

    @property
    def owner(self) -> str:
        """The name of ``module``."""
        return self.name if self.parameter == "weight" else self.name.rpartition(".")[0]

    @property
    def full_name(self) -> str:
        return f"{self.owner}.{self.parameter}" if self.owner else self.parameter

    @property
    def kind(self) -> type[nn.Module] | None:
        """The class that ``module`` becomes an instance of; None if it keeps its class."""
        return FP8Linear if self.parameter == "weight" and is_plain_linear(self.module) else None


@dataclass(frozen=True)
class Conversion:
    """What will happen to one matrix, or one stack of experts: it is converted, or kept with a reason.

    ``ties`` are the other occurrences of the same parameter in the model. ``scheme`` is what a recipe says; None leaves
    it to the options.
    """

    places: tuple[Holder, ...]
    reason: str = ""
    scheme: SchemeName | None = None

    @property
    def name(self) -> str:
        return self.places[0].name

    @property
    def module(self) -> nn.Module:
        return self.places[0].module

    @property
    def parameter(self) -> str:
        """The parameter's name in ``module``."""
        return self.places[0].parameter

    @property
    def ties(self) -> tuple[Holder, ...]:
        return self.places[1:]

    def make(self, options: FP8GemmOptions, search: Search | None = None) -> nn.Parameter:
        """The FP8 parameter; the module is not changed. ``search`` is as in ``made``."""
        options = self.effective(options)
        found: nn.Parameter = made(self.module, self.parameter, options, layout=self.layout, search=search)
        return found

    def effective(self, options: FP8GemmOptions) -> FP8GemmOptions:
        """``options`` with the scheme that this matrix gets."""
        if not self.multiplied:  # an embedding table: one scale per row
            return replace(options, scheme=SCHEMES["row"])
        return options if self.scheme is None else replace(options, scheme=self.scheme)

    @property
    def full_name(self) -> str:
        """The parameter's name in the model."""
        return self.places[0].full_name

    @property
    def tensor(self) -> nn.Parameter:
        """The dense parameter."""
        found = self.module._parameters[self.parameter]
        assert found is not None
        return found

    @property
    def layout(self) -> Layout:
        """How its memory is a matrix or a stack, of one that converts."""
        found = self.places[0].role.layout
        assert found is not None
        return found

    @property
    def multiplied(self) -> bool:
        """Whether the matrix is a factor of products, and not only a table of embeddings."""
        return any(place.role.multiplied for place in self.places)

    @property
    def converts(self) -> bool:
        return not self.reason


def plan(model: nn.Module, *, options: Options = None, module_filter: ModuleFilter | None = None) -> list[Conversion]:
    """What ``enable_fp8_gemm`` would do with each layer, without touching any. Raises what it would raise.

    Example:
        >>> model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        >>> [(step.name, step.reason) for step in plan(model, module_filter="a")]
        [('a', ''), ('b', 'module_filter')]
    """
    recipe = Recipe.of(options)
    steps, wanted = planned(model, recipe, module_filter, {})
    complain(wanted, steps, model, recipe)
    return steps


def planned(
    model: nn.Module, options: Options, module_filter: ModuleFilter | None, seen: Mapping[str, Role]
) -> tuple[list[Conversion], Filter]:
    """The plan, given the observed roles of parameters; does not raise if there is nothing to convert."""
    recipe = Recipe.of(options)
    wanted = Filter(module_filter)
    kept = _KeptModules(routers(model), _adapters(model))
    found = [step for places in _places(model, seen) if (step := _step(places, wanted, kept, recipe)) is not None]
    return found, wanted


def complain(wanted: Filter, steps: list[Conversion], model: nn.Module, options: Options) -> None:
    """Raises, or with ``strict=False`` warns, if the filter or the model leaves nothing to do, or the recipe cannot be
    followed."""
    recipe = Recipe.of(options)
    problems = [f"module_filter pattern {pattern!r} matches no layer" for pattern in wanted.unmatched()]
    problems += unmet(recipe, steps, model)
    if not any(step.converts for step in steps):
        already = sum(isinstance(held(parameter), FP8Weight) for parameter in model.parameters())
        found = "; ".join(f"{step.name or 'the model itself'}: {step.reason}" for step in steps[:5])
        more = f"; and {len(steps) - 5} more" if len(steps) > 5 else ""
        problems.append(
            f"nothing to convert: {type(model).__name__} has "
            + (f"{already} layers on FP8 already and " if already else "")
            + (f"{len(steps)} other matrices, all kept ({found}{more})" if steps else "no other layer with a matrix")
        )
    if not problems:
        return
    if recipe.options.strict:
        raise ValueError("; ".join(problems) + ". FP8GemmOptions(strict=False) makes this a warning")
    warnings.warn("; ".join(problems), stacklevel=3)


def unmet(recipe: Recipe, steps: list[Conversion], model: nn.Module) -> list[str]:
    """What the recipe says of layers that the model does not have, or that cannot become what it says."""
    reasons = {place.name: step.reason for step in steps for place in step.places}
    matrices = {
        layer_name(prefix, name): (name, held(tensor))
        for prefix, module in model.named_modules()
        for name, tensor in module._parameters.items()
    }
    problems = []
    for layer, treatment in recipe.layers.items():
        name, weight = matrices.get(layer, ("", None))
        reason = reasons.get(layer, "" if layer in reasons else "it is not a factor of a matrix product")
        if layer not in reasons and weight is None:
            problems.append(no_layer(layer, reasons))
        elif isinstance(weight, FP8Weight):
            home = weight._home
            options = recipe.options if treatment == ORIGINAL else replace(recipe.options, scheme=treatment)
            if treatment == ORIGINAL or home.scheme != scheme_for(options, name, home.layout.shape):
                problems.append(f"the recipe says {treatment!r} for {layer!r}, which is on FP8 already: {home.scheme}")
        elif treatment != ORIGINAL and reason and not reason.startswith("module_filter"):
            problems.append(f"the recipe says {treatment!r} for {layer!r}, which cannot be converted: {reason}")
    return problems


def _places(model: nn.Module, seen: Mapping[str, Role]) -> Iterator[list[Holder]]:
    """All parameters with a role, and their occurrences; a module with two parents is one occurrence."""
    found: dict[int, list[Holder]] = {}
    for prefix, module in model.named_modules():
        for parameter, tensor in module._parameters.items():
            if tensor is None or isinstance(held(tensor), FP8Weight):
                continue
            name = layer_name(prefix, parameter)
            role = role_of(module, parameter)
            if role is None or role.layout is None or role.reason:
                role = seen.get(f"{prefix}.{parameter}".strip("."), role)
            if role is not None:
                found.setdefault(id(tensor), []).append(Holder(name, module, parameter, role))
    yield from found.values()
    yield from _computed(model)


def _computed(model: nn.Module) -> Iterator[list[Holder]]:
    """Linears whose weight is not a parameter."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module._parameters.get("weight") is None:
            reason = "its weight is not a parameter but computed, as by weight_norm or spectral_norm"
            yield [Holder(name, module, "weight", Role(reason=reason))]


@dataclass(frozen=True)
class _KeptModules:
    """Modules that are kept unless a filter names them, by id, with their experts or the reason."""

    routers: Mapping[int, str]
    adapters: Mapping[int, str]

    def reason(self, module: nn.Module) -> str:
        experts = self.routers.get(id(module))
        if experts is not None:
            return f"it is the router of {experts}: a module_filter that names it converts it"
        return self.adapters.get(id(module), "")


def _step(places: list[Holder], wanted: Filter, kept: _KeptModules, recipe: Recipe) -> Conversion | None:
    """What will happen to one parameter; None if it is neither converted nor listed."""
    treatment, options = recipe.treatment(place.name for place in places), recipe.options
    scheme = None if treatment == ORIGINAL else treatment
    options = options if scheme is None else replace(options, scheme=scheme)
    factors = [place for place in places if place.role.multiplied]
    tables = [place for place in places if place.role.looked_up]
    only_table = not factors and len(tables) == len(places)
    if only_table and not options.embeddings and treatment is None:
        return None
    first = (factors or places)[0]
    reason = wanted.reason_of_tied([(place.name, place.module) for place in factors or places])
    for place in tables if factors else ():
        reason = reason or wanted.exclusion(place.name)
    reason = reason or (KEPT_BY_RECIPE if treatment == ORIGINAL else "")
    if only_table and scheme is not None and SCHEMES[scheme].weight != ROW:
        reason = reason or "an embedding table has one scale per row"
    for place in places:
        by_name = scheme is not None or wanted.names(place.name, place.module)
        role = place.role
        reason = reason or ("" if by_name else kept.reason(place.module))
        reason = reason or ("" if by_name and role.by_name else role.reason)
        if not reason and role.layout is None:
            reason = f"it is also {place.full_name}, which is not a factor of a matrix product"
    layouts = {place.role.layout for place in places}
    if not reason and len(layouts) > 1:
        reason = f"{' and '.join(place.full_name for place in places)} are one tensor, used in two layouts"
    reason = reason or _keep_reason(first, options)
    named = only_table and treatment is not None
    if reason and not named and not any(place.role.listed for place in places):
        return None
    return Conversion((first, *(place for place in places if place is not first)), reason, scheme)


def _keep_reason(place: Holder, options: FP8GemmOptions) -> str:
    """Why a matrix must be kept; empty if it can be converted."""
    weight, layout = place.module._parameters[place.parameter], place.role.layout
    assert weight is not None
    assert layout is not None
    if reason := refusal(place.module, place.parameter, layout):
        return reason
    if is_split(weight):
        if options.fp16_weight_storage != "discard":
            return "its weight is split among ranks, which keep no originals: use fp16_weight_storage='discard'"
    elif is_traceable_wrapper_subclass(weight):
        return f"its weight is a {type(weight).__name__}: patch the model before it is wrapped"
    if weight.dtype not in COMPUTE_DTYPES:
        return f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return f"its weight has no elements: {tuple(weight.shape)}"
    if weight.is_meta and getattr(place.module.__dict__.get("_hf_hook"), "offload", False):
        return "its weight is offloaded by accelerate: patch the model before it is offloaded"
    if weight.is_meta or not options.materialize_fp8_on_wrap:
        return ""  # the engine is chosen on the device where the weight will be
    return _engine_reason(place.name, place.parameter, weight, layout.shape, options)


# The names of peft's children for the wrapped module, and for a trainable copy of a module.
_WRAPPED, _TRAINED = "base_layer", "modules_to_save"


def _adapters(model: nn.Module) -> dict[int, str]:
    """The modules that are adapters or trainable copies of others, with the reason to keep them."""
    found: dict[int, str] = {}
    for name, wrapper in model.named_modules():
        children = wrapper._modules
        parts = [part for key, part in children.items() if _WRAPPED in children and key != _WRAPPED]
        for part in [*parts, children.get(_TRAINED)]:
            for module in () if part is None else part.modules():
                found[id(module)] = f"it is an adapter of {name}: a module_filter that names it converts it"
    return found


def _engine_reason(
    name: str, parameter: str, weight: nn.Parameter, shape: tuple[int, ...], options: FP8GemmOptions
) -> str:
    """Why no engine can run a weight on its device; raises instead if the user requested an engine by name."""
    spec = spec_of(shape, options, scheme_for(options, parameter, shape), weight.dtype)
    try:
        choose(spec, probe(weight.device), options.engine)
    except UnsupportedError as error:
        if options.engine == "auto":
            return str(error).replace("\n", ";")
        raise UnsupportedError(f"{name or 'the model itself'}: {error}") from None
    return ""
