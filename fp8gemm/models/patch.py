"""Patching a model: plan every layer first, then convert; and the way back."""

from __future__ import annotations

import copy
import ctypes
import math
import sys
from dataclasses import replace
from typing import TypeVar

from torch import nn

from ..checkpoint import give_saving_back, redirect_saving
from ..progress import progress
from ..scaled import FP8GemmOptions
from ..weights.experts import FP8Experts
from ..weights.linear import FP8Linear
from ..weights.report import KEPT, Report, Row
from .gated import split_gated
from .selection import ModuleFilter, Step, plan

Model = TypeVar("Model", bound=nn.Module)


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
    ``save_pretrained`` of a transformers model writes what ``save_checkpoint`` does from then on.

    The original weights are freed as it goes; ``FP8GemmOptions(fp16_weight_storage="keep")`` holds them for an exact
    undo. Everything that can fail is checked before the first layer changes. What interrupts the work later, such as
    Ctrl-C, puts every layer back: with its own weight, or dequantized where that was freed already.

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
        twin = _converted_copy(model, steps, options)
        redirect_saving(twin)
        return twin
    _convert_all(steps, options)
    if options.fp16_weight_storage == "discard":
        _return_freed_memory()
    _remember_kept(steps)
    redirect_saving(model)
    return model


def disable_fp8_gemm(model: Model) -> tuple[Model, Report]:
    """Gives every layer its former self back: the same object with its own weight, or, where that was discarded, with
    the dequantized one.

    Returns:
        ``model``, and a report in which the ``reason`` of each layer says which of the two it got.
    """
    rows = []
    give_saving_back(model)
    split_gated(model)
    for name, module in list(model.named_modules()):
        module.__dict__.pop(KEPT, None)
        if not isinstance(module, (FP8Linear, FP8Experts)):
            continue
        shape, size = module.weight_shape, math.prod(module.weight_shape) * module.compute_dtype.itemsize
        if isinstance(module, FP8Linear):
            exact = module.revert()
        else:
            owner, _, stack = name.rpartition(".")
            exact = module.revert(model.get_submodule(owner), stack)
        reason = "original weight" if exact else "dequantized weight: the original was discarded"
        rows.append(Row(name=name, status="kept", shape=shape, reason=reason, bytes_before=size, bytes_after=size))
    return model, Report(tuple(rows))


def _convert_all(steps: list[Step], options: FP8GemmOptions) -> None:
    todo = [step for step in steps if step.converts]
    done: list[Step] = []
    try:
        for step in progress(todo, what="quantizing to FP8", total=len(todo)):
            step.convert(options)
            done.append(step)
    except BaseException:  # of any kind, Ctrl-C too: the model goes back to what it was, and the error goes on
        for step in done:
            step.revert()
        raise


def _return_freed_memory() -> None:
    """glibc keeps what was freed below the top of its heap; in a patched model that is half of what it was."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _converted_copy(model: Model, steps: list[Step], options: FP8GemmOptions) -> Model:
    """A deep copy in which the converted layers take the place of dense ones, which are never copied themselves."""
    todo = [step for step in steps if step.converts and not step.stack]
    twins: dict[int, FP8Linear] = {}
    for step in progress(todo, what="quantizing to FP8", total=len(todo)):
        assert isinstance(step.module, nn.Linear)
        twins[id(step.module)] = FP8Linear.from_linear(step.module, options)
    memo: dict[int, object] = dict(twins)
    for key, twin in twins.items():
        # A twin still shares bias, hooks and a kept weight with its original: those are copied like everything else.
        memo[key] = copy.deepcopy(twin, memo)
    result = copy.deepcopy(model, memo)
    for layer in result.modules():
        if isinstance(layer, FP8Linear) and layer.materialized and layer.device.type != "meta":
            layer.materialize_fp8_weight()  # a copy holds plain bytes; the engine's form of them is made now
    stacked = [step for step in steps if step.converts and step.stack]
    for step in progress(stacked, what="quantizing experts to FP8", total=len(stacked)):
        owner, _, _ = step.name.rpartition(".")
        replace(step, module=result.get_submodule(owner)).convert(options)
    kept = [step for step in steps if not step.converts]
    _remember_kept([replace(step, module=result.get_submodule(_place(step))) for step in kept])
    return result


def _place(step: Step) -> str:
    """The name of the module that a step is about."""
    return step.name.rpartition(".")[0] if step.stack else step.name


def _remember_kept(steps: list[Step]) -> None:
    """Writes the reasons where the report reads them."""
    for step in steps:
        if not step.converts:
            reasons = step.module.__dict__.setdefault(KEPT, {})
            reasons[step.stack] = step.reason
