"""The plan: what will become of every Linear and every stack of experts, and why; nothing is touched."""

from __future__ import annotations

import fnmatch
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..engines import choose, probe
from ..errors import UnsupportedError
from ..scaled import COMPUTE_DTYPES, FP8GemmOptions
from ..weights import FP8Linear, FP8Weight, made
from ..weights.convert import scheme_for
from ..weights.packed import spec_of
from ..weights.structure import STACK_NAMES, is_transposed, routers, stacks

ModuleFilter = Callable[[str, nn.Module], bool] | str | Iterable[str]

# Linears whose forward is nn.Linear's own; the second is nn.MultiheadAttention's out_proj.
_PLAIN = (nn.Linear, NonDynamicallyQuantizableLinear)


@dataclass(frozen=True)
class Conversion:
    """What will become of one layer, or of one stack of experts: it is converted, or kept with a reason."""

    name: str
    module: nn.Module
    reason: str = ""
    stack: str = ""  # the parameter of ``module`` that is a stack of experts
    transposed: bool = False  # the stack is [E, K, N]

    @property
    def owner(self) -> str:
        """The name of ``module``."""
        return self.name.rpartition(".")[0] if self.stack else self.name

    @property
    def parameter(self) -> str:
        """The name of the parameter in ``module`` that is converted."""
        return self.stack or "weight"

    def make(self, options: FP8GemmOptions) -> nn.Parameter:
        """The FP8 parameter, without touching the module."""
        found: nn.Parameter = made(self.module, self.parameter, options, turned=self.transposed)
        return found

    @property
    def kind(self) -> type[nn.Module] | None:
        """The class that ``module`` becomes an instance of; None where it stays what it is."""
        return None if self.stack else FP8Linear

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
    wanted = _Filter(module_filter)
    holders = _weight_holders(model)
    choosing, adapters = routers(model), _adapters(model)
    steps = [
        Conversion(
            name,
            module,
            wanted.reason(name, module)
            or ("" if wanted.names(name, module) else _router_reason(module, choosing) or adapters.get(id(module), ""))
            or _keep_reason(name, module, options, holders),
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module._parameters.get("weight"), FP8Weight)
    ]
    steps += _stack_steps(model, wanted, options, holders)
    steps += _bare_parameters(model)
    _complain(wanted, steps, model, options)
    return steps


def _complain(wanted: _Filter, steps: list[Conversion], model: nn.Module, options: FP8GemmOptions) -> None:
    """A filter or a model that gives nothing to do is an error, or a warning where that is asked for."""
    problems = [f"module_filter pattern {pattern!r} matches no Linear" for pattern in wanted.unmatched()]
    if not any(step.converts for step in steps):
        already = sum(isinstance(parameter, FP8Weight) for parameter in model.parameters())
        found = "; ".join(f"{step.name or 'the model itself'}: {step.reason}" for step in steps[:5])
        more = f"; and {len(steps) - 5} more" if len(steps) > 5 else ""
        problems.append(
            f"nothing to convert: {type(model).__name__} has "
            + (f"{already} layers on FP8 already and " if already else "")
            + (f"{len(steps)} other Linears, all kept ({found}{more})" if steps else "no other nn.Linear")
        )
    if not problems:
        return
    if options.strict:
        raise ValueError("; ".join(problems) + ". FP8GemmOptions(strict=False) makes this a warning")
    warnings.warn("; ".join(problems), stacklevel=4)


def _keep_reason(name: str, module: nn.Linear, options: FP8GemmOptions, holders: dict[int, list[str]]) -> str:
    """Why a Linear must stay as it is; empty if it can be converted."""
    if type(module) not in (*_PLAIN, FP8Linear):  # an FP8Linear whose weight was replaced by a dense one
        return f"{type(module).__name__} is a subclass of nn.Linear with ways of its own"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter but computed, as by weight_norm or spectral_norm"
    others = [holder for holder in holders[id(weight)] if holder != (f"{name}.weight" if name else "weight")]
    if others:
        return f"its weight is tied to {', '.join(others)}"
    if is_traceable_wrapper_subclass(weight):
        return _wrapped(weight)
    if weight.dtype not in COMPUTE_DTYPES:
        return f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return f"its weight has no elements: {tuple(weight.shape)}"
    if weight.is_meta and getattr(module.__dict__.get("_hf_hook"), "offload", False):
        return "its weight is offloaded by accelerate: patch the model before it is offloaded"
    if weight.is_meta or not options.materialize_fp8_on_wrap:
        return ""  # the engine is chosen where the weight will be
    return _engine_reason(name, "weight", weight, tuple(weight.shape), options)


def _wrapped(weight: object) -> str:
    return f"its weight is a {type(weight).__name__}: patch the model before it is distributed or wrapped"


def _router_reason(module: nn.Module, choosing: dict[int, str]) -> str:
    experts = choosing.get(id(module))
    return "" if experts is None else f"it is the router of {experts}: a module_filter that names it converts it"


# Where peft keeps what an adapter wraps, and what trains in the place of a module.
_WRAPPED, _TRAINED = "base_layer", "modules_to_save"


def _adapters(model: nn.Module) -> dict[int, str]:
    """The Linears that are adapters, or train in the place of others, with the reason to keep them."""
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


def _stack_steps(
    model: nn.Module, wanted: _Filter, options: FP8GemmOptions, holders: dict[int, list[str]]
) -> Iterator[Conversion]:
    """What becomes of every stack of experts; one of an unknown name needs a filter that names it."""
    for prefix, owner in model.named_modules():
        for stack in stacks(owner):
            if isinstance(owner._parameters[stack], FP8Weight):
                continue
            name = f"{prefix}.{stack}" if prefix else stack
            reason = wanted.reason(name, owner)
            if not reason and stack not in STACK_NAMES and not wanted.names(name, owner):
                reason = "a stack of matrices, perhaps no experts: a module_filter that names it converts it"
            parameter, transposed = owner._parameters[stack], is_transposed(owner, stack)
            assert parameter is not None
            others = [holder for holder in holders[id(parameter)] if holder != name]
            if not reason and is_traceable_wrapper_subclass(parameter):
                reason = _wrapped(parameter)
            if not reason and others:
                reason = f"it is tied to {', '.join(others)}"
            if not reason and not parameter.is_meta and options.materialize_fp8_on_wrap:
                experts, a, b = parameter.shape
                shape = (experts, b, a) if transposed else (experts, a, b)
                reason = _engine_reason(name, stack, parameter, shape, options)
            yield Conversion(name, owner, reason, stack, transposed)


def _bare_parameters(model: nn.Module) -> Iterator[Conversion]:
    """Matrices that are parameters without an nn.Linear around them: seen and reported, not converted."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.MultiheadAttention):
            continue  # Linears have their own steps; embeddings, norms and convolutions are no matrix products
        names = [key for key, parameter in module._parameters.items() if parameter is not None and _matrix(parameter)]
        if names and not isinstance(module, (nn.Linear, nn.Embedding, nn.EmbeddingBag)):
            yield Conversion(name, module, f"not an nn.Linear: {', '.join(names)} of {type(module).__name__}")


def _matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix of a size worth a product."""
    if isinstance(parameter, (nn.UninitializedParameter, FP8Weight)) or not parameter.dtype.is_floating_point:
        return False
    return parameter.dim() == 2 and min(parameter.shape) >= 16


def _weight_holders(model: nn.Module) -> dict[int, list[str]]:
    """The names under which each parameter is found; a module with two parents counts once, as it is one object."""
    holders: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    return holders


class _Filter:
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

    def names(self, name: str, module: nn.Module) -> bool:
        """Whether the user chose this very layer, not only did not exclude it."""
        if self.chosen is not None:
            return bool(self.chosen(name, module))
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.included)

    def unmatched(self) -> list[str]:
        patterns = [*self.included, *(f"!{pattern}" for pattern in self.excluded)]
        return [pattern for pattern in patterns if not self.hits[pattern.removeprefix("!")]]
