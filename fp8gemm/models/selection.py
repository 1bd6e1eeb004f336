"""The plan: what will become of every matrix that the model multiplies by, and why; nothing is touched."""

from __future__ import annotations

import fnmatch
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..engines import choose, probe
from ..errors import UnsupportedError
from ..scaled import COMPUTE_DTYPES, SCHEMES, FP8GemmOptions
from ..weights import FP8Linear, FP8Weight, made
from ..weights.convert import scheme_for
from ..weights.packed import spec_of
from ..weights.structure import routers
from .owners import Role, is_plain_linear, role_of

ModuleFilter = Callable[[str, nn.Module], bool] | str | Iterable[str]


@dataclass(frozen=True)
class Holder:
    """Where a parameter is found: its module, its name there, and what it is to that module."""

    name: str  # of the layer: the module's, or the parameter's where that is not called weight
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
        """The class that ``module`` becomes an instance of; None where it stays what it is."""
        return FP8Linear if self.parameter == "weight" and is_plain_linear(self.module) else None


@dataclass(frozen=True)
class Conversion:
    """What will become of one matrix, or of one stack of experts: it is converted, or kept with a reason.

    ``ties`` are the other places at which the model has the same parameter.
    """

    places: tuple[Holder, ...]
    reason: str = ""

    @property
    def name(self) -> str:
        return self.places[0].name

    @property
    def module(self) -> nn.Module:
        return self.places[0].module

    @property
    def parameter(self) -> str:
        """Its name in ``module``."""
        return self.places[0].parameter

    @property
    def ties(self) -> tuple[Holder, ...]:
        return self.places[1:]

    def make(self, options: FP8GemmOptions) -> nn.Parameter:
        """The FP8 parameter, without touching the module."""
        if not any(place.role.multiplied for place in self.places):  # a table: a scale for each of its rows
            options = replace(options, scheme=SCHEMES["row"])
        found: nn.Parameter = made(self.module, self.parameter, options, layout=self.places[0].role.layout)
        return found

    @property
    def converts(self) -> bool:
        return not self.reason


def plan(
    model: nn.Module, *, options: FP8GemmOptions | None = None, module_filter: ModuleFilter | None = None
) -> list[Conversion]:
    """What ``enable_fp8_gemm`` would do with each layer, without touching any. Raises what it would raise.

    Example:
        >>> model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        >>> [(step.name, step.reason) for step in plan(model, module_filter="a")]
        [('a', ''), ('b', 'module_filter')]
    """
    options = options or FP8GemmOptions()
    steps, wanted = planned(model, options, module_filter, {})
    complain(wanted, steps, model, options)
    return steps


def planned(
    model: nn.Module, options: FP8GemmOptions, module_filter: ModuleFilter | None, seen: Mapping[str, Role]
) -> tuple[list[Conversion], Filter]:
    """The plan, with the roles that were seen of parameters; nothing is complained about."""
    wanted = Filter(module_filter)
    kept = _KeptModules(routers(model), _adapters(model))
    found = [step for places in _places(model, seen) if (step := _step(places, wanted, kept, options)) is not None]
    return found, wanted


def complain(wanted: Filter, steps: list[Conversion], model: nn.Module, options: FP8GemmOptions) -> None:
    """A filter or a model that gives nothing to do is an error, or a warning where that is asked for."""
    problems = [f"module_filter pattern {pattern!r} matches no layer" for pattern in wanted.unmatched()]
    if not any(step.converts for step in steps):
        already = sum(isinstance(parameter, FP8Weight) for parameter in model.parameters())
        found = "; ".join(f"{step.name or 'the model itself'}: {step.reason}" for step in steps[:5])
        more = f"; and {len(steps) - 5} more" if len(steps) > 5 else ""
        problems.append(
            f"nothing to convert: {type(model).__name__} has "
            + (f"{already} layers on FP8 already and " if already else "")
            + (f"{len(steps)} other matrices, all kept ({found}{more})" if steps else "no other layer with a matrix")
        )
    if not problems:
        return
    if options.strict:
        raise ValueError("; ".join(problems) + ". FP8GemmOptions(strict=False) makes this a warning")
    warnings.warn("; ".join(problems), stacklevel=3)


def _places(model: nn.Module, seen: Mapping[str, Role]) -> Iterator[list[Holder]]:
    """Every parameter with a role, at all the places where it is found; a module with two parents is one place."""
    found: dict[int, list[Holder]] = {}
    for prefix, module in model.named_modules():
        for parameter, tensor in module._parameters.items():
            if tensor is None or isinstance(tensor, FP8Weight):
                continue
            name = prefix if parameter == "weight" else f"{prefix}.{parameter}".strip(".")
            role = role_of(module, parameter)
            if role is None or role.layout is None or role.reason:
                role = seen.get(f"{prefix}.{parameter}".strip("."), role)
            if role is not None:
                found.setdefault(id(tensor), []).append(Holder(name, module, parameter, role))
    yield from found.values()
    yield from _computed(model)


def _computed(model: nn.Module) -> Iterator[list[Holder]]:
    """Linears whose weight is no parameter."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module._parameters.get("weight") is None:
            reason = "its weight is no parameter but computed, as by weight_norm or spectral_norm"
            yield [Holder(name, module, "weight", Role(reason=reason))]


@dataclass(frozen=True)
class _KeptModules:
    """Modules that stay as they are unless a filter names them, by id, with what they belong to or the reason."""

    routers: Mapping[int, str]
    adapters: Mapping[int, str]

    def reason(self, module: nn.Module) -> str:
        experts = self.routers.get(id(module))
        if experts is not None:
            return f"it is the router of {experts}: a module_filter that names it converts it"
        return self.adapters.get(id(module), "")


def _step(places: list[Holder], wanted: Filter, kept: _KeptModules, options: FP8GemmOptions) -> Conversion | None:
    """What becomes of one parameter; None for what is neither converted nor worth a word."""
    factors = [place for place in places if place.role.multiplied]
    tables = [place for place in places if place.role.looked_up]
    if not factors and tables and len(tables) == len(places) and not options.embeddings:
        return None
    first = (factors or places)[0]
    reason = wanted.reason_of_tied([(place.name, place.module) for place in factors or places])
    for place in tables if factors else ():
        reason = reason or wanted.exclusion(place.name)
    for place in places:
        named = wanted.names(place.name, place.module)
        role = place.role
        reason = reason or ("" if named else kept.reason(place.module))
        reason = reason or ("" if named and role.by_name else role.reason)
        if not reason and role.layout is None:
            reason = f"it is {place.full_name} too, which is no factor of a product"
    layouts = {place.role.layout for place in places}
    if not reason and len(layouts) > 1:
        reason = f"{' and '.join(place.full_name for place in places)} are one tensor, used in two layouts"
    reason = reason or _keep_reason(first, options)
    if reason and not any(place.role.listed for place in places):
        return None
    return Conversion((first, *(place for place in places if place is not first)), reason)


def _keep_reason(place: Holder, options: FP8GemmOptions) -> str:
    """Why a matrix must stay as it is; empty if it can be converted."""
    weight, layout = place.module._parameters[place.parameter], place.role.layout
    assert weight is not None
    assert layout is not None
    if is_traceable_wrapper_subclass(weight):
        return f"its weight is a {type(weight).__name__}: patch the model before it is distributed or wrapped"
    if weight.dtype not in COMPUTE_DTYPES:
        return f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return f"its weight has no elements: {tuple(weight.shape)}"
    if weight.is_meta and getattr(place.module.__dict__.get("_hf_hook"), "offload", False):
        return "its weight is offloaded by accelerate: patch the model before it is offloaded"
    if weight.is_meta or not options.materialize_fp8_on_wrap:
        return ""  # the engine is chosen where the weight will be
    return _engine_reason(place.name, place.parameter, weight, layout.shape, options)


# Where peft keeps what an adapter wraps, and what trains in the place of a module.
_WRAPPED, _TRAINED = "base_layer", "modules_to_save"


def _adapters(model: nn.Module) -> dict[int, str]:
    """The modules that are adapters, or train in the place of others, with the reason to keep them."""
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
    """Why no engine can run a weight where it is; raises instead for an engine that the user named."""
    spec = spec_of(shape, options, scheme_for(options, parameter, shape), weight.dtype)
    try:
        choose(spec, probe(weight.device), options.engine)
    except UnsupportedError as error:
        if options.engine == "auto":
            return str(error).replace("\n", ";")
        raise UnsupportedError(f"{name or 'the model itself'}: {error}") from None
    return ""


class Filter:
    """The user's choice of layers, and which of its patterns have matched."""

    def __init__(self, module_filter: ModuleFilter | None) -> None:
        self.chosen = module_filter if callable(module_filter) else None
        patterns: list[str] = []
        if isinstance(module_filter, str):
            patterns = [module_filter]
        elif module_filter is not None and not callable(module_filter):
            patterns = list(module_filter)
        self.included = [pattern for pattern in patterns if not pattern.startswith("!")]
        self.excluded = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
        self.hits: Counter[str] = Counter()

    def reason(self, name: str, module: nn.Module) -> str:
        """Why a layer is not wanted; empty if it is."""
        if self.chosen is not None:
            return "" if self.chosen(name, module) else "module_filter"
        included = [pattern for pattern in self.included if fnmatch.fnmatchcase(name, pattern)]
        excluded = [pattern for pattern in self.excluded if fnmatch.fnmatchcase(name, pattern)]
        self.hits.update(included + excluded)
        if excluded:
            return f"module_filter: !{excluded[0]}"
        return "" if included or not self.included else "module_filter"

    def reason_of_tied(self, places: list[tuple[str, nn.Module]]) -> str:
        """Why the one weight of several layers is not wanted: one pattern that names it is enough to want it, one that
        excludes it, or a callable that says no, not to."""
        reasons = [self.reason(name, module) for name, module in places]
        against = [reason for reason in reasons if reason]
        excluded = [reason for reason in against if self.chosen is not None or "!" in reason]
        return excluded[0] if excluded else "" if len(against) < len(reasons) else against[0]

    def exclusion(self, name: str) -> str:
        """Why a place that comes along with a layer is not wanted; empty if nothing excludes it."""
        excluded = [pattern for pattern in self.excluded if fnmatch.fnmatchcase(name, pattern)]
        self.hits.update(excluded)
        return f"module_filter: !{excluded[0]}" if excluded else ""

    def names(self, name: str, module: nn.Module) -> bool:
        """Whether the user chose this very layer, not only did not exclude it."""
        if self.chosen is not None:
            return bool(self.chosen(name, module))
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.included)

    def unmatched(self) -> list[str]:
        patterns = [*self.included, *(f"!{pattern}" for pattern in self.excluded)]
        return [pattern for pattern in patterns if not self.hits[pattern.removeprefix("!")]]
