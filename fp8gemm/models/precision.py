"""The precision at which converted layers run, changed and changed back; and a schedule of it over diffusion steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from ..errors import UnsupportedError
from ..scaled import Precision
from ..weights import FP8Weight
from ..weights.precision import refusal, repacked, switch
from ..weights.sharding import held, is_distributed
from ..weights.stored import Stored
from ..weights.structure import layer_name
from .filters import Filter, ModuleFilter
from .interrupts import undisturbed

_SHOWN = 8  # names in an error


@dataclass(frozen=True)
class _Layer:
    """A converted weight, and all layers that have it as a parameter."""

    weight: FP8Weight
    places: tuple[tuple[str, nn.Module], ...]

    @property
    def name(self) -> str:
        return " = ".join(name or "the model itself" for name, _ in self.places)


def set_precision(model: nn.Module, pattern: ModuleFilter, precision: Precision) -> tuple[str, ...]:
    """Runs the products of matching converted layers at another precision, until the next call.

    ``"weight_only"`` multiplies the same FP8 bytes by unquantized activations; a static activation scale is not used
    meanwhile. ``"original"`` runs the kept originals: every read of the weight, and so every product, is what it was
    before the model was patched. ``"fp8"`` is what the layers were converted to. Nothing is quantized again, the
    parameters stay the same objects, and state dicts and checkpoints are the same at every precision. A compiled model
    is compiled once more for each; a captured CUDA graph keeps the precision that it was captured with.

    Where an engine stores weights in a layout of its own, the layout of FP8 and that of weight-only are both held.

    Args:
        pattern: the layers, as ``module_filter`` of ``enable_fp8_gemm``: globs over full names, where a ``!`` excludes,
            or a callable ``(name, module) -> bool``. Tied layers change together.
        precision: ``"fp8"``, ``"weight_only"`` or ``"original"``.

    Returns:
        The names of the layers that run at ``precision`` now.

    Raises:
        ValueError: a pattern matches no converted layer, or an original was not kept. Nothing has changed then.
        UnsupportedError: the requested engine cannot run a layer at that precision, or a weight is split among
            processes. Nothing has changed then.

    Example:
        >>> import torch
        >>> from fp8gemm import FP8GemmOptions, enable_fp8_gemm
        >>> layer, x = nn.Linear(64, 32), torch.randn(3, 64)
        >>> dense = layer(x)
        >>> model = enable_fp8_gemm(layer, options=FP8GemmOptions(fp16_weight_storage="keep"))
        >>> set_precision(model, "*", "original"), model(x).equal(dense)
        (('the model itself',), True)
        >>> set_precision(model, "*", "fp8"), model(x).equal(dense)
        (('the model itself',), False)
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, found {precision!r}")
    layers = _matching(model, pattern)
    _act(_planned(layers, precision))
    return tuple(layer.name for layer in layers)


def _layers(model: nn.Module) -> list[_Layer]:
    """The converted weights of a model, in its order."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    weights: dict[int, FP8Weight] = {}
    inside: nn.Module = getattr(model, "_orig_mod", model)  # of torch.compile(model)
    for prefix, module in inside.named_modules():
        for parameter, tensor in module._parameters.items():
            if not isinstance(held(tensor), FP8Weight):
                continue
            name = layer_name(prefix, parameter)
            if not isinstance(tensor, FP8Weight) or is_distributed(tensor):
                raise UnsupportedError(
                    f"{name} is split among processes: set the precision before the model is split (weight_only stays)"
                )
            found.setdefault(id(tensor._home), []).append((name, module))
            weights[id(tensor._home)] = tensor
    return [_Layer(weights[key], tuple(places)) for key, places in found.items()]


def _matching(model: nn.Module, pattern: ModuleFilter) -> list[_Layer]:
    layers, wanted = _layers(model), Filter(pattern)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no FP8 weights at the moment: call enable_fp8_gemm(model) first, and set no "
            "precision inside of paused(model)"
        )
    chosen = [layer for layer in layers if not wanted.reason_of_tied(list(layer.places))]
    problems = [f"pattern {one!r} matches no converted layer" for one in wanted.unmatched()]
    if not problems and not chosen:
        problems = ["pattern selects no converted layer"]
    if problems:
        names = ", ".join(layer.name for layer in layers[:_SHOWN])
        more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
        raise ValueError(f"{'; '.join(problems)}; converted are {names}{more}")
    return chosen


Step = tuple[_Layer, Precision, Stored | None]


def _planned(layers: list[_Layer], precision: Precision) -> list[Step]:
    """What ``switch`` needs for each layer; everything that can fail is done here."""
    refused = [f"{layer.name}: {problem}" for layer in layers if (problem := refusal(layer.weight._home, precision))]
    if refused:
        more = f"\n  and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise ValueError(
            "precision 'original' needs the originals, which are missing:\n  "
            + "\n  ".join(refused[:_SHOWN])
            + more
            + "\nFP8GemmOptions(fp16_weight_storage='keep' or 'cpu_offload') keeps them; fp8gemm.paused(model) runs on "
            "the dequantized values instead"
        )
    steps: list[Step] = []
    for layer in layers:
        try:
            steps.append((layer, precision, repacked(layer.weight._home, precision, layer.weight.dtype)))
        except UnsupportedError as error:
            raise UnsupportedError(f"{layer.name} at precision {precision!r}: {error}") from None
    return steps


def _act(steps: list[Step]) -> None:
    """Switches all layers; Ctrl-C waits until the last one."""

    def act(interrupts: Any) -> None:
        for layer, precision, stored in steps:
            switch(layer.weight._home, precision, stored)
            for _, module in layer.places:
                module.__dict__.get("_bound", {}).clear()

    undisturbed(act)


@contextmanager
def precision_schedule(
    model: nn.Module,
    steps: int,
    *,
    first: int = 0,
    last: int = 0,
    precision: Precision = "weight_only",
    pattern: ModuleFilter = "*",
    calls_per_step: int = 1,
) -> Iterator[None]:
    """Runs the first and the last steps of a diffusion loop at another precision, and those between as they are set.

    While the block lasts, the calls of ``model`` itself are counted: the transformer or U-Net that is called once a
    step. The precision changes before a call, from the same bytes, and at the end of the block, however it ends, all
    layers are as they were. Give the object that is called: if that is ``torch.compile(model)``, then that.

    Args:
        steps: the number of steps that the block will run.
        first: how many steps, from the first one on, run at ``precision``.
        last: how many steps, up to the last one, run at ``precision``.
        precision: ``"weight_only"`` or ``"original"``, as for ``set_precision``.
        pattern: the layers, as for ``set_precision``.
        calls_per_step: how often a step calls ``model``; classifier-free guidance without batching calls it twice.

    Raises:
        ValueError: ``model`` is called more often than ``steps * calls_per_step`` times; or as for ``set_precision``.
        UnsupportedError: as for ``set_precision``, before the block begins.

    A block that begins fewer steps than announced warns at its end: the last ones may have run at the wrong precision.

    Example:
        >>> import torch
        >>> from fp8gemm import enable_fp8_gemm, report
        >>> model, x = enable_fp8_gemm(nn.Linear(64, 64)), torch.randn(4, 64)
        >>> with precision_schedule(model, 4, first=1):
        ...     for _ in range(4):
        ...         x = model(x)
        ...         print(report(model).rows[0].precision)
        weight_only
        fp8
        fp8
        fp8
    """
    for name, value, least in (("steps", steps, 1), ("first", first, 0), ("last", last, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")
    if calls_per_step < 1:
        raise ValueError(f"calls_per_step must be at least 1, found {calls_per_step}")
    if precision not in ("weight_only", "original"):
        raise ValueError(f"precision must be weight_only or original, found {precision!r}")
    layers = _matching(model, pattern)
    _planned(layers, precision)
    former = [layer.weight._home.precision for layer in layers]
    schedule = _Schedule(
        steps, first, last, calls_per_step, lambda special: _set(layers, former, special and precision)
    )
    uncount = _count_calls(model, schedule.begin_call)
    try:
        yield
    finally:
        uncount()
        _set(layers, former, None)
    if schedule.step < steps:
        warnings.warn(
            f"precision_schedule: {schedule.step} of {steps} steps were begun, in {schedule.calls} calls of the "
            f"{type(model).__name__} that it was given"
            + ("" if schedule.calls else "; give the object that is called, for example the compiled one"),
            stacklevel=3,
        )


@dataclass
class _Schedule:
    """The steps so far; ``change`` gets whether a step is one of the first or last ones."""

    steps: int
    first: int
    last: int
    calls_per_step: int
    change: Callable[[bool], object]
    calls: int = 0
    special: bool = False

    @property
    def step(self) -> int:
        """How many steps have begun."""
        return -(-self.calls // self.calls_per_step)

    def begin_call(self) -> None:
        if self.calls >= self.steps * self.calls_per_step:
            raise ValueError(
                f"precision_schedule was told {self.steps} steps of {self.calls_per_step} calls, and the model is "
                f"called once more: pass the number of steps that run, or calls_per_step="
                f"{self.calls_per_step + 1} if each step calls the model so often"
            )
        self.calls += 1
        special = self.step <= self.first or self.step > self.steps - self.last
        if special != self.special:
            self.change(special)
            self.special = special


def _set(layers: list[_Layer], former: list[Precision], precision: Precision | bool | None) -> None:
    """Sets all layers to ``precision`` or, without one, back to what they had; those that have it stay untouched."""
    wanted: list[Precision] = [precision or one for one in former]  # type: ignore[misc]
    for one in set(wanted):
        changed = [
            layer
            for layer, asked in zip(layers, wanted, strict=True)
            if asked == one and layer.weight._home.precision != one
        ]
        _act(_planned(changed, one))


def _count_calls(model: nn.Module, begin: Callable[[], None]) -> Callable[[], None]:
    """Calls ``begin`` before each call of ``model``; returns what undoes that."""
    compiled = model._compiled_call_impl
    if compiled is None:
        return model.register_forward_pre_hook(lambda *given: begin(), prepend=True).remove

    def counted(*args: Any, **kwargs: Any) -> Any:  # by model.compile(): a graph does not see hooks that come later
        begin()
        return compiled(*args, **kwargs)

    model._compiled_call_impl = counted

    def undo() -> None:
        model._compiled_call_impl = compiled

    return undo
