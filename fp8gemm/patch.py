"""Patching a model: plan every layer first, then convert; and the way back."""

from __future__ import annotations

import copy
import ctypes
import fnmatch
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .engines import MatmulSpec, choose, probe
from .errors import UnsupportedError
from .linear import FP8Linear
from .progress import progress
from .report import KEPT, Report, Row, kept_reason, report
from .scaled import COMPUTE_DTYPES, FP8GemmOptions

ModuleFilter = Callable[[str, nn.Module], bool] | str | Iterable[str]
Model = TypeVar("Model", bound=nn.Module)

# Linears whose forward is nn.Linear's own; the second is nn.MultiheadAttention's out_proj.
_PLAIN = (nn.Linear, NonDynamicallyQuantizableLinear)


@dataclass(frozen=True)
class Step:
    """What will become of one layer: it is converted, or kept with a reason."""

    name: str
    module: nn.Module
    reason: str = ""

    @property
    def converts(self) -> bool:
        return not self.reason


def enable_fp8_gemm(
    model: Model,
    *,
    options: FP8GemmOptions | None = None,
    module_filter: ModuleFilter | None = None,
    inplace: bool = True,
) -> Model:
    """Makes every Linear of ``model`` run on FP8 weights.

    Each layer stays the same object under the same name, so hooks, shared modules and references of any kind
    survive; the model itself may be a Linear. What is not converted is kept with a reason: see ``report(model)``.

    Args:
        options: see ``FP8GemmOptions``.
        module_filter: which layers: a callable ``(name, module) -> bool``, or one or more glob patterns over the
            full names (``"*.mlp.*"``); a pattern that begins with ``!`` excludes.
        inplace: False leaves ``model`` as it is and returns a converted copy that shares nothing with it.

    Returns:
        ``model`` itself, or the copy.

    Raises:
        ValueError: nothing to convert, or a pattern that matches no layer (warnings with ``strict=False``).
        UnsupportedError: the engine that was named cannot run a layer. Nothing has been touched then.
    """
    options = options or FP8GemmOptions()
    steps = plan(model, options=options, module_filter=module_filter)
    if not inplace:
        return _converted_copy(model, steps, options)
    _convert_all(steps, options)
    if options.fp16_weight_storage == "discard":
        _return_freed_memory()
    for step in steps:
        if not step.converts:
            step.module.__dict__[KEPT] = step.reason
    return model


def disable_fp8_gemm(model: Model) -> tuple[Model, Report]:
    """Gives every layer its former self back: the same object with its own weight, or, where that was discarded, with
    the dequantized one.

    Returns:
        ``model``, and a report in which the ``reason`` of each layer says which of the two it got.
    """
    rows = []
    for name, module in list(model.named_modules()):
        module.__dict__.pop(KEPT, None)
        if isinstance(module, FP8Linear):
            size = module.out_features * module.in_features * module.compute_dtype.itemsize
            shape = (module.out_features, module.in_features)
            exact = module.revert()
            reason = "original weight" if exact else "dequantized weight: the original was discarded"
            rows.append(Row(name=name, status="kept", shape=shape, reason=reason, bytes_before=size, bytes_after=size))
    return model, Report(tuple(rows))


def plan(
    model: nn.Module, *, options: FP8GemmOptions | None = None, module_filter: ModuleFilter | None = None
) -> list[Step]:
    """What ``enable_fp8_gemm`` would do with each layer, without touching any. Raises what it would raise."""
    options = options or FP8GemmOptions()
    wanted = _Filter(module_filter)
    holders = _weight_holders(model)
    steps = [
        Step(name, module, wanted.reason(name, module) or _keep_reason(name, module, options, holders))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, FP8Linear)
    ]
    steps += _bare_parameters(model)
    _complain(wanted, steps, model, options)
    return steps


def _complain(wanted: _Filter, steps: list[Step], model: nn.Module, options: FP8GemmOptions) -> None:
    """A filter or a model that gives nothing to do is an error, or a warning where that is asked for."""
    problems = [f"module_filter pattern {pattern!r} matches no Linear" for pattern in wanted.unmatched()]
    if not any(step.converts for step in steps):
        already = sum(isinstance(module, FP8Linear) for module in model.modules())
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
    if type(module) not in _PLAIN:
        return f"{type(module).__name__} is a subclass of nn.Linear with ways of its own"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter but computed, as by weight_norm or spectral_norm"
    others = [holder for holder in holders[id(weight)] if holder != (f"{name}.weight" if name else "weight")]
    if others:
        return f"its weight is tied to {', '.join(others)}"
    if weight.dtype not in COMPUTE_DTYPES:
        return f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return f"its weight has no elements: {tuple(weight.shape)}"
    if weight.is_meta or not options.materialize_fp8_on_wrap:
        return ""  # the engine is chosen where the weight will be
    n, k = weight.shape
    spec = MatmulSpec(
        scheme=options.resolved_scheme, n=n, k=k, compute_dtype=weight.dtype, weight_dtype=options.weight_dtype
    )
    try:
        choose(spec, probe(weight.device), options.engine)
    except UnsupportedError as error:
        if options.engine == "auto":
            return str(error).replace("\n", ";")
        raise UnsupportedError(f"{name or 'the model itself'}: {error}") from None
    return ""


def _bare_parameters(model: nn.Module) -> Iterator[Step]:
    """Matrices that are parameters without an nn.Linear around them: seen and reported, not converted."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.MultiheadAttention):
            continue  # Linears have their own steps; embeddings, norms and convolutions are no matrix products
        names = [key for key, parameter in module._parameters.items() if parameter is not None and _matrix(parameter)]
        if names and not isinstance(module, nn.Linear):
            yield Step(name, module, f"not an nn.Linear: {', '.join(names)} of {type(module).__name__}")


def _matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix, or a stack of them, of a size worth a product."""
    if isinstance(parameter, nn.UninitializedParameter) or not parameter.dtype.is_floating_point:
        return False
    stacked = parameter.dim() == 3 and parameter.shape[0] > 1
    return (parameter.dim() == 2 or stacked) and min(parameter.shape[-2:]) >= 16


def _weight_holders(model: nn.Module) -> dict[int, list[str]]:
    """The names under which each parameter is found; a module with two parents counts once, as it is one object."""
    holders: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    return holders


def _convert_all(steps: list[Step], options: FP8GemmOptions) -> None:
    todo = [step for step in steps if step.converts]
    done: list[Step] = []
    try:
        for step in progress(todo, what="quantizing to FP8", total=len(todo)):
            assert isinstance(step.module, nn.Linear)
            FP8Linear.convert(step.module, options)
            done.append(step)
    except BaseException:  # of any kind, Ctrl-C too: the model goes back to what it was, and the error goes on
        for step in done:
            assert isinstance(step.module, FP8Linear)
            step.module.revert()
        raise


def _return_freed_memory() -> None:
    """glibc keeps what was freed below the top of its heap; in a patched model that is half of what it was."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _converted_copy(model: Model, steps: list[Step], options: FP8GemmOptions) -> Model:
    """A deep copy in which the converted layers take the place of dense ones, which are never copied themselves."""
    todo = [step for step in steps if step.converts]
    twins: dict[int, FP8Linear] = {}
    for step in progress(todo, what="quantizing to FP8", total=len(todo)):
        assert isinstance(step.module, nn.Linear)
        twins[id(step.module)] = FP8Linear.from_linear(step.module, options)
    memo: dict[int, object] = dict(twins)
    for key, twin in twins.items():
        # A twin still shares bias, hooks and a kept weight with its original: those are copied like everything else.
        memo[key] = copy.deepcopy(twin, memo)
    result = copy.deepcopy(model, memo)
    names = {step.name: step.reason for step in steps if not step.converts}
    for name, module in result.named_modules():
        if name in names:
            module.__dict__[KEPT] = names[name]
    return result


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

    def unmatched(self) -> list[str]:
        patterns = [*self.included, *(f"!{pattern}" for pattern in self.excluded)]
        return [pattern for pattern in patterns if not self.hits[pattern.removeprefix("!")]]


__all__ = ["Step", "disable_fp8_gemm", "enable_fp8_gemm", "kept_reason", "plan", "report"]
