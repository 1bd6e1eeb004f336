"""Patching a model: every layer is planned before the first is converted. And undoing that."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

from torch import nn

from ..checkpoint import give_saving_back, redirect_saving
from ..errors import UnsupportedError
from ..progress import progress
from ..scaled import FP8GemmOptions
from ..weights import Change, FP8Weight, leave, own_weights, passes, revert
from ..weights.report import COVERAGE, KEPT, Report, Row
from ..weights.search import Search
from ..weights.sharding import held, is_distributed
from ..weights.structure import layer_name
from .filters import ModuleFilter
from .first_forward import FirstForward, Then, remove
from .gated import split_gated
from .interrupts import Interrupts, undisturbed
from .moments import refuse, searches
from .observation import Observer, watch
from .recipe import Options, Recipe
from .selection import Conversion, complain, planned, unmet

Model = TypeVar("Model", bound=nn.Module)


def enable_fp8_gemm(
    model: Model,
    *,
    options: Options = None,
    module_filter: ModuleFilter | None = None,
    inplace: bool = True,
    example_inputs: object = None,
    calibration_inputs: object = None,
) -> Model:
    """Converts every matrix that ``model`` multiplies by to FP8.

    These are the weights of Linears and similar layers, packed projections of attention, stacks of experts, output
    heads with the embeddings tied to them, and convolutions whose windows do not overlap. They are found by the
    structure and code of each module, without running the model. With ``example_inputs`` one forward pass is observed
    as well, and bare parameters that turn out to be factors of products are converted, too.

    Each layer stays the same object under the same name, so hooks, shared modules and references survive; the model
    itself may be a Linear. What is not converted is kept with a reason: see ``report(model)``. From then on,
    ``save_pretrained`` of a transformers model writes what ``save_checkpoint`` does.

    Each original weight is freed as it is converted; ``FP8GemmOptions(fp16_weight_storage="keep")`` keeps them for an
    exact undo. Everything that can fail is checked before the first layer changes. If the conversion is interrupted
    later, by Ctrl-C or a lack of memory, every layer is restored: with its own weight or, if that was freed already,
    with a dequantized one; the error and a warning then say how many those are.

    Args:
        options: see ``FP8GemmOptions``. A ``Recipe``, its dict or the path of its JSON file also says which layers get
            another scheme or are kept.
        module_filter: the layers to convert: a callable ``(name, module) -> bool``, or one or more glob patterns over
        the
            full names (``"*.mlp.*"``); a pattern that begins with ``!`` excludes.
        inplace: False leaves ``model`` unchanged and returns a converted copy that shares nothing with it.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments, on which ``model``
            is run once before anything is converted; or ``"first call"``, to observe the first call instead and convert
            what it shows right after it.
        calibration_inputs: with a ``weight_search`` other than ``"none"``: a tensor, a tuple of positional arguments, a
            mapping of keyword arguments, or an iterable of those, on which the dense model is run first, to see what
            each weight is multiplied by.

    Returns:
        ``model`` itself, or the copy.

    Raises:
        ValueError: nothing to convert, a pattern that matches no layer, or a recipe that names a layer which the model
            does not have or which cannot be converted (warnings with ``strict=False``); calibration inputs that are
            missing, have no effect, or give a weight NaN or infinite values.
        UnsupportedError: the requested engine cannot run a layer. The model is then unchanged.
        TypeError: ``model`` is not an nn.Module, such as a pipeline, whose parts are patched one by one.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        >>> enable_fp8_gemm(model, module_filter="!2") is model
        True
        >>> type(model[0]).__name__, type(model[2]).__name__, model(torch.randn(3, 64)).shape
        ('FP8Linear', 'Linear', torch.Size([3, 64]))
    """
    _refuse_other_objects(model)
    recipe = Recipe.of(options)
    options = recipe.options
    waits = isinstance(example_inputs, str) and example_inputs == FIRST_CALL
    refuse(options, calibration_inputs, waits=waits)
    seen = {} if example_inputs is None or waits else watch(model, example_inputs).roles()
    steps, wanted = planned(model, recipe, module_filter, seen)
    if not waits:
        complain(wanted, steps, model, recipe)
    found = searches(model, steps, options, calibration_inputs)
    first = FirstForward(_ConvertSeen(recipe, module_filter) if waits else _note_coverage)
    if inplace:

        def convert(interrupts: Interrupts) -> None:
            _convert_all(model, steps, options, interrupts, found)
            passes.install(model)
            first.install(model)

        undisturbed(convert)
        if options.fp16_weight_storage == "discard":
            _return_freed_memory()
    else:
        model = _converted_copy(model, steps, options, found)
        passes.install(model)
        first.install(model)
    return model


def _refuse_other_objects(model: object) -> None:
    if isinstance(model, nn.Module):
        return
    parts = getattr(model, "components", None)  # as pipelines of diffusers call them; others have attributes
    named = parts if isinstance(parts, Mapping) else getattr(model, "__dict__", {})
    found = [name for name, part in named.items() if isinstance(part, nn.Module)]
    raise TypeError(
        f"enable_fp8_gemm takes an nn.Module, found {type(model).__name__}"
        + (f"; patch its parts, each by itself: {', '.join(found)}" if found else "")
    )


FIRST_CALL = "first call"


def _note_coverage(model: nn.Module, observer: Observer) -> None:
    if not observer.failed:
        model.__dict__[COVERAGE] = observer.coverage()


@dataclass(frozen=True)
class _ConvertSeen:
    """Converts what the first forward pass has shown, and observes the next one to measure the coverage."""

    recipe: Recipe
    module_filter: ModuleFilter | None

    def __call__(self, model: nn.Module, observer: Observer) -> None:
        _note_coverage(model, observer)
        steps, wanted = planned(model, self.recipe, self.module_filter, observer.roles())
        undisturbed(lambda interrupts: _convert_all(model, steps, self.recipe.options, interrupts))
        passes.install(model)  # the pass that has just run was dense
        converted = any(isinstance(held(parameter), FP8Weight) for parameter in model.parameters())
        if not converted or unmet(self.recipe, steps, model):
            options = replace(self.recipe.options, strict=False)
            complain(wanted, steps, model, replace(self.recipe, options=options))
        FirstForward(_note_coverage).install(model)

    def __reduce__(self) -> Any:
        """Filters may not be picklable: a pickled model only measures its coverage and converts nothing more."""
        return (_coverage_only, ())


def _coverage_only() -> Then:
    return _note_coverage


def disable_fp8_gemm(model: Model) -> tuple[Model, Report]:
    """Restores every layer: the same object with its original weight or, if that was discarded, a dequantized one. Tied
    parameters stay tied.

    After an interruption every layer still runs, and a second call completes the undo.

    Returns:
        ``model``, and a report in which the ``reason`` of each layer says which of the two it got.

    Raises:
        UnsupportedError: the model is distributed, so other ranks hold parts of its weights. It is then unchanged.

    Example:
        >>> model = enable_fp8_gemm(nn.Linear(64, 32), options=FP8GemmOptions(fp16_weight_storage="keep"))
        >>> model, undone = disable_fp8_gemm(model)
        >>> type(model).__name__, undone.rows[0].reason
        ('Linear', 'original weight')
    """
    if any(is_distributed(parameter) for parameter in model.parameters()):
        raise UnsupportedError(
            "the FP8 weights are distributed among ranks; call disable_fp8_gemm before sharding the model"
        )
    return model, Report(tuple(undisturbed(lambda interrupts: _revert_all(model, interrupts))))


def _revert_all(model: nn.Module, interrupts: Interrupts) -> list[Row]:
    rows = []
    remove(model)
    passes.remove(model)
    model.__dict__.pop(COVERAGE, None)
    give_saving_back(model)
    split_gated(model)
    modules = list(model.named_modules())
    for prefix, module in modules:
        module.__dict__.pop(KEPT, None)
        for parameter, weight in own_weights(module):
            name = layer_name(prefix, parameter)
            size, shape = weight.numel() * weight.dtype.itemsize, tuple(weight._home.layout.shape)
            exact = revert(module, parameter)
            reason = "original weight" if exact else "dequantized weight: the original was discarded"
            rows.append(Row(name=name, status="kept", shape=shape, reason=reason, bytes_before=size, bytes_after=size))
        leave(module)  # even if a dense weight has replaced the FP8 one
        interrupts.deliver()
    return rows


def _convert_all(
    model: nn.Module,
    steps: list[Conversion],
    options: FP8GemmOptions,
    interrupts: Interrupts,
    found: Mapping[int, Search] = MappingProxyType({}),
) -> None:
    todo = [step for step in steps if step.converts]
    reasons = [(place.module, dict(place.module.__dict__.get(KEPT, {}))) for step in steps for place in step.places]
    begun: list[Change] = []
    try:
        for step in progress(todo, what="quantizing to FP8", total=len(todo)):
            try:
                interrupts.open = True
                parameter = step.make(options, found.get(id(step.tensor)))  # changes nothing
            finally:
                interrupts.open = False
            change = Change(*((place.module, place.parameter, place.kind) for place in step.places))
            begun.append(change)
            change.put(parameter)
            interrupts.deliver()
        _remember_kept(steps, model)
        redirect_saving(model)
    except BaseException as error:  # of any kind: restore the model and raise it again
        _put_back(model, reasons, begun, error, len(steps))
        if isinstance(error, KeyboardInterrupt):
            interrupts.drop()
        raise


def _put_back(
    model: nn.Module,
    reasons: list[tuple[nn.Module, dict[str, str]]],
    begun: list[Change],
    error: BaseException,
    layers: int,
) -> None:
    lost = stuck = 0
    for change in reversed(begun):
        try:
            lost += not change.undo()
        except (RuntimeError, MemoryError):  # not enough memory for dense values: the layer stays FP8, and runs
            stuck += 1
    give_saving_back(model)
    redirect_saving(model)  # of layers that were FP8 before
    for module, former in reasons:
        module.__dict__.pop(KEPT, None)
        if former:
            module.__dict__[KEPT] = former
    if lost or stuck:
        text = (
            f"enable_fp8_gemm was interrupted: {lost} of {layers} layers, whose originals had been freed, came "
            f"back dequantized from FP8{f', and {stuck} stay FP8 for lack of memory' if stuck else ''}; load the model "
            "again, or use FP8GemmOptions(fp16_weight_storage='keep')"
        )
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(text)
        with contextlib.suppress(
            UserWarning
        ):  # where warnings are errors it must not take the place of the one at hand
            warnings.warn(text, stacklevel=5)


def _return_freed_memory() -> None:
    """Returns freed memory to the system: glibc keeps what lies below the top of its heap, half of a patched model."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _converted_copy(
    model: Model, steps: list[Conversion], options: FP8GemmOptions, found: Mapping[int, Search]
) -> Model:
    """A deep copy with FP8 weights in place of the dense ones, which are not copied."""
    todo = [step for step in steps if step.converts]
    memo: dict[int, Any] = {}
    twins: list[nn.Parameter] = []
    for step in progress(todo, what="quantizing to FP8", total=len(todo)):
        twin = step.make(options, found.get(id(step.tensor)))
        home = held(twin)._home
        if home.original is not None or home.dense is not None:
            twin = copy.deepcopy(twin)  # a copy of its own, where it has the original
            home = held(twin)._home
            if home.dense is None and not twin.is_meta:
                home.form(twin.dtype)
        twins.append(twin)
        memo[id(step.module._parameters[step.parameter])] = twin  # for all its occurrences
    result = copy.deepcopy(model, memo)
    for step, twin in zip(todo, twins, strict=True):
        Change(*((result.get_submodule(place.owner), place.parameter, place.kind) for place in step.places)).put(twin)
    _remember_kept(steps, result)
    redirect_saving(result)
    return result


def _remember_kept(steps: list[Conversion], model: nn.Module) -> None:
    """Stores the reasons in the modules of ``model``, where the report finds them."""
    for step in steps:
        if not step.converts:
            module = model.get_submodule(step.places[0].owner)
            module.__dict__.setdefault(KEPT, {})[step.parameter] = step.reason
