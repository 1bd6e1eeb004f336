"""Estimating what FP8 gains before anything is patched: shares of time, predicted speed, and bytes."""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from ..engines import probe
from ..errors import UnsupportedError
from ..models.batches import Batch, evaluating
from ..models.filters import ModuleFilter
from ..models.recipe import Options, Recipe
from ..models.selection import Conversion, complain, planned
from ..scaled import FP8GemmOptions
from ..weights import FP8Weight
from ..weights.convert import scheme_for
from ..weights.sharding import held
from ..weights.shares import is_split
from ..weights.structure import ITSELF
from .gain import Estimate, LayerEstimate
from .profile import Clock, Problem, Profile, Recorder, counted
from .stand_ins import SECONDS, Cost, Rehearsal, costs

# What a model raises for arguments that it does not take.
_MISFITS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)
_PASSES = 3  # that are recorded
_FINE = 1e-6  # seconds; the clock of threads on Windows is coarser
Prepare = Callable[[], Callable[[], Any]]  # prepares a call of the model, which is then timed


def estimate(
    model: nn.Module,
    *inputs: Any,
    options: Options = None,
    module_filter: ModuleFilter | None = None,
    **kwargs: Any,
) -> Estimate:
    """What ``enable_fp8_gemm(model, options=..., module_filter=...)`` would gain, measured without patching anything.

    The model runs on ``inputs`` and ``kwargs``, in evaluation mode and without gradients, some ten times. Every
    different product that would be converted is timed dense and on FP8, on this machine and with the engine that the
    options choose, with random weights of the same shape: ``FP8Linear`` against ``nn.Linear``, so that what a call
    costs besides its kernel counts. The predicted speed follows by Amdahl's law; bytes are exact. That takes a few
    seconds, and memory for up to 256 MiB of dense weights and as many on FP8 as correspond to them, or for the largest
    weights once. The model is left as it is, bit for bit.

    Without inputs, or with a parameter on meta, only bytes are estimated.

    Args:
        inputs: positional arguments of the model; a model of transformers may take ``**tokenizer(...)``.
        options: as for ``enable_fp8_gemm``.
        module_filter: as for ``enable_fp8_gemm``.
        kwargs: keyword arguments of the model.

    Raises:
        ValueError: the model has FP8 weights already, there is nothing to convert, a pattern matches no layer, or the
            model cannot run on these inputs.
        UnsupportedError: the requested engine cannot run a layer, or the model is split among processes.
        TypeError: ``model`` is not an nn.Module.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).bfloat16()
        >>> found = estimate(model, torch.ones(8, 64, dtype=torch.bfloat16))
        >>> found.bytes_before, found.bytes_after, found.speedup > 0
        (32768, 17152, True)
        >>> print(estimate(model))
        speed: not timed: there are no inputs to run the model on
        weights: 2 to convert, 0 kept dense, 0.03 MB -> 0.02 MB
        whole model: 0.03 MB -> 0.02 MB
        layer  N x K       MB  after
        0      128 x 64  0.02   0.01
        2      64 x 128  0.02   0.01
    """
    _refuse(model)
    recipe = Recipe.of(options)
    steps, wanted = planned(model, recipe, module_filter, {})
    complain(wanted, steps, model, recipe)
    tensors = _tensors(model)
    rows = tuple(_sized(step, recipe.options) for step in steps)
    if any(tensor.is_meta for tensor in tensors):
        return _whole(rows, tensors, untimed="the model is on meta")
    if not inputs and not kwargs:
        return _whole(rows, tensors, untimed="there are no inputs to run the model on")
    batch, clock = Batch(inputs, kwargs), clock_of({tensor.device for tensor in tensors})
    return measured(model, steps, recipe.options, batch, clock)


def measured(
    model: nn.Module,
    steps: Sequence[Conversion],
    options: FP8GemmOptions,
    batch: Batch,
    clock: Clock,
    seconds: float = SECONDS,
) -> Estimate:
    """The estimate for a plan; ``seconds`` is how long products are timed, about."""
    tensors = _tensors(model)
    with evaluating(model):
        run = _runner(model, batch)
        _first(model, run)
        profile = profiled(model, steps, options, run, clock)
        rehearsal = Rehearsal.of(problem for _, problem in profile.calls)
        rounds = list(rehearsal.rounds(lambda: _seconds(run, clock), clock, seconds=seconds))
    took, costed = statistics.median(one.forward for one in rounds), costs(rounds)
    engines = {problem: rehearsal.engine(problem) for problem in costed}
    rows = tuple(_timed(_sized(step, options), step, took, profile, costed, engines) for step in steps)
    place = _place({tensor.device for tensor in tensors})
    return _whole(rows, tensors, seconds=took, attention=profile.attention, place=place)


def clock_of(devices: Iterable[torch.device]) -> Clock:
    """The time when all work on these devices is done. On a CPU with one thread it is the time in which this thread has
    computed: what other programs take does not count, and would only blur the shares."""
    cards = [device for device in devices if device.type == "cuda"]

    def clock() -> float:
        for card in cards:
            torch.cuda.synchronize(card)
        return time.perf_counter()

    alone = torch.get_num_threads() == 1 and time.get_clock_info("thread_time").resolution < _FINE
    return clock if cards else time.thread_time if alone else time.perf_counter


def _refuse(model: object) -> None:
    """Raises for what cannot be estimated."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"estimate takes an nn.Module, found {type(model).__name__}")
    split = [name for name, parameter in model.named_parameters() if is_split(parameter)]
    if split:
        raise UnsupportedError(f"{split[0]} is split among processes: estimate the model before it is split")
    patched = [name for name, parameter in model.named_parameters() if isinstance(held(parameter), FP8Weight)]
    if patched:
        raise ValueError(
            f"{len(patched)} weights of {type(model).__name__} are on FP8 already, {patched[0]} the first: "
            "report(model) says what they take; to estimate, call disable_fp8_gemm(model) first, or estimate within "
            "`with paused(model):`"
        )


def _runner(model: nn.Module, batch: Batch) -> Prepare:
    """Prepares a run of the model on the batch; caches that the model fills are copied for each run, before it."""
    whole = all(map(_is_plain, (batch.args, batch.kwargs)))

    def prepare() -> Callable[[], Any]:
        one = batch if whole else Batch(*copy.deepcopy((batch.args, batch.kwargs)))
        return lambda: one.run(model)

    return prepare


def _is_plain(value: object) -> bool:
    """Whether a model cannot change an argument without writing to a tensor."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (torch.Tensor, int, float, str, torch.dtype, torch.device))


def _seconds(run: Prepare, clock: Clock) -> float:
    call = run()
    start = clock()
    call()
    return clock() - start


def _first(model: nn.Module, run: Prepare) -> None:
    try:
        run()()
    except _MISFITS as error:
        raise ValueError(
            f"{type(model).__name__} cannot run on these inputs, which are given as in model(*inputs, **kwargs): "
            f"{type(error).__name__}: {error}"
        ) from error


def profiled(
    model: nn.Module, steps: Sequence[Conversion], options: FP8GemmOptions, run: Prepare, clock: Clock
) -> Profile:
    """The products of one pass, and the medians over several of the seconds of what stays as it is."""
    recorders = []
    for _ in range(_PASSES):
        recorder, call = Recorder(model, steps, options, clock), run()
        with recorder.recording():
            call()
        recorders.append(recorder)
    names = dict.fromkeys(name for recorder in recorders for name in recorder.kept)
    kept = {name: statistics.median(recorder.kept[name] for recorder in recorders) for name in names}
    attention = statistics.median(recorder.attention for recorder in recorders)
    return Profile(tuple(recorders[0].calls), attention, kept)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """All parameters and buffers that exist, each once."""
    found = [*model.parameters(), *model.buffers()]
    return list({id(one): one for one in found if not isinstance(one, UninitializedTensorMixin)}.values())


def _whole(rows: tuple[LayerEstimate, ...], tensors: Sequence[torch.Tensor], **found: Any) -> Estimate:
    before = sum(tensor.nbytes for tensor in tensors)
    saved = sum(row.bytes_before - row.bytes_after for row in rows)
    return Estimate(rows=rows, model_bytes_before=before, model_bytes_after=before - saved, **found)


def _place(devices: Iterable[torch.device]) -> str:
    names = sorted({f"{device} {probe(device).name}".strip() for device in devices})
    threads = torch.get_num_threads()
    return f"{', '.join(names)}, {threads} thread{'s' if threads > 1 else ''}"


def _sized(step: Conversion, options: FP8GemmOptions) -> LayerEstimate:
    """A weight and its bytes, which ``report`` would show after patching."""
    name, ties = step.name or ITSELF, tuple(place.name for place in step.ties)
    weight: Any = step.module._parameters.get(step.parameter)
    if weight is None or isinstance(weight, UninitializedTensorMixin):
        weight = getattr(step.module, step.parameter, None)  # computed at each access, as by weight_norm
    if not step.converts:
        known = isinstance(weight, torch.Tensor) and not isinstance(weight, UninitializedTensorMixin)
        size, shape = (weight.nbytes, tuple(weight.shape)) if known else (0, ())
        return LayerEstimate(
            name=name, status="kept", shape=shape, reason=step.reason, bytes_before=size, bytes_after=size
        )
    layout = step.layout
    scheme = scheme_for(step.effective(options), step.parameter, layout.shape)
    before = weight.numel() * weight.dtype.itemsize
    after = scheme.nbytes(layout.shape)
    return LayerEstimate(
        name=name,
        ties=ties,
        status="fp8",
        shape=tuple(layout.shape),
        scheme=str(scheme),
        bytes_before=before,
        bytes_after=after + (0 if options.fp16_weight_storage == "discard" else before),
    )


def _timed(
    row: LayerEstimate,
    step: Conversion,
    seconds: float,
    profile: Profile,
    costed: Mapping[Problem, Cost],
    engines: Mapping[Problem, str],
) -> LayerEstimate:
    """The row with the time of its products in one forward pass."""
    if not step.converts:
        return LayerEstimate(**{**vars(row), "seconds": profile.kept.get(step.places[0].full_name, 0.0)})
    calls: Counter[Problem] = counted(profile.calls).get(id(step), Counter())
    dense = {problem: seconds * costed[problem].share * count for problem, count in calls.items()}
    times = {
        "calls": sum(calls.values()),
        "tokens": sum(problem.tokens * count for problem, count in calls.items()),
        "seconds": sum(dense.values()),
        "seconds_fp8": sum(took * costed[problem].ratio for problem, took in dense.items()),
        "engine": ", ".join(dict.fromkeys(engines[problem] for problem in calls)),
    }
    return LayerEstimate(**{**vars(row), **times})
