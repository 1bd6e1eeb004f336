"""Interrupting patching and undoing at any point: the model is converted or unchanged, and every layer runs."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import fp8gemm
from fp8gemm import FP8GemmOptions, FP8Linear, FP8Weight, disable_fp8_gemm, enable_fp8_gemm
from fp8gemm.weights import packed

PACKAGE = str(Path(fp8gemm.__file__).parent)
SETTINGS = [
    (storage, inplace, eager)
    for storage in ("keep", "cpu_offload", "discard")
    for inplace in (True, False)
    for eager in (True, False)
]
by_setting = pytest.mark.parametrize(("storage", "inplace", "eager"), SETTINGS)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch) -> Iterator[None]:
    """Exceptions raised while a generator or a tqdm bar is finalized reach nobody."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    gc.collect()


class PreTrainedModel(nn.Module):
    """Has the name and module of a transformers model, whose ``save_pretrained`` is redirected."""

    __module__ = "transformers.modeling_utils"


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 64, 32) / 6)
        self.down_proj = nn.Parameter(torch.randn(2, 32, 32) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.gate_up_proj, self.down_proj, strict=True):
            x = nn.functional.linear(nn.functional.linear(x, up)[:, :32], down)
        return x


class Special(nn.Linear):
    """Kept, with a reason."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight * 2, self.bias)


class Model(PreTrainedModel):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.experts = Experts()
        self.special = Special(32, 32)
        self.last = nn.Linear(32, 16, bias=False)
        self.tied = nn.Linear(32, 32)
        self.tied.weight = self.first.weight
        self.first.weight.tensor_model_parallel = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.tied(self.special(self.experts(self.first(x)))))


class Watched:
    """A model, its earlier state, and what is wrong with it afterwards."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.x = torch.randn(3, 32)
        self.parameters = dict(self.model.named_parameters())
        self.values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.facts = self.look()
        with torch.no_grad():
            self.expected = self.model(self.x)

    def look(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, module in self.model.named_modules():
            hooks = (len(module._state_dict_hooks), len(module._load_state_dict_pre_hooks))
            own = sorted(vars(module).keys() - {"_fp8gemm_coverage"})  # recorded by the first forward pass
            found[name] = (type(module), own, hooks, list(module._parameters))
        for name, parameter in self.model.named_parameters():
            found[f"parameter {name}"] = (type(parameter), sorted(vars(parameter)), parameter.requires_grad)
        return found

    def fp8(self) -> list[str]:
        return [name for name, parameter in self.model.named_parameters() if isinstance(parameter, FP8Weight)]

    def runs(self) -> list[str]:
        """Why the model does not behave as before; empty if it does."""
        try:
            with torch.no_grad():
                y = self.model(self.x)
        except Exception as error:
            return [f"cannot run: {type(error).__name__}: {error}"]
        close = torch.allclose(y, self.expected, rtol=0, atol=0.2 * float(self.expected.abs().max()))
        return [] if close else ["changed: other results"]

    def faults(self, *, said: bool, exact: bool) -> list[str]:
        """What is wrong after an interrupt; ``exact`` requires the original parameters, unless a loss was reported."""
        model, faults, left = self.model, self.runs(), self.fp8()
        if left:
            whole = len(left) == 4 and type(model.first) is type(model.last) is type(model.tied) is FP8Linear
            whole = whole and model.first.weight is model.tied.weight
            return faults if whole else [*faults, f"changed: {left} stayed FP8"]
        if self.look() != self.facts:
            before, after = self.facts, self.look()
            faults.append(f"changed: {[(k, before.get(k), after.get(k)) for k in after if after[k] != before.get(k)]}")
        if model.first.weight is not model.tied.weight:
            faults.append("changed: no longer tied")
        same = all(parameter is self.parameters[name] for name, parameter in model.named_parameters())
        equal = all(torch.equal(parameter, self.values[name]) for name, parameter in model.named_parameters())
        if exact and not same:
            faults.append("changed: other parameters")
        if not (equal or said) or (exact and not equal):
            faults.append("changed: other values, without a word")
        return faults


def attempt(act: Callable[[], object]) -> tuple[BaseException | None, bool]:
    """The exception that interrupted ``act``, and whether it reports layers that were dequantized."""
    caught: BaseException | None = None
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            act()
        except BaseException as error:
            caught = error
    said = [str(warning.message) for warning in heard] + getattr(caught, "__notes__", [])
    return caught, any("came back dequantized" in text for text in said)


class Strike(BaseException):
    """The exception that the tests inject."""


@contextlib.contextmanager
def striking(n: int, *, lines: bool = False) -> Iterator[list[str]]:
    """Raises at the ``n``-th call, or line, inside of the package; yields where that was."""
    seen, struck = 0, []

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == ("line" if lines else "call"):
            seen += 1
            if seen == n:
                struck.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}")
                raise Strike(struck[0])
        return trace if lines else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield struck
    finally:
        sys.settrace(before)


def options(storage: str, eager: bool) -> FP8GemmOptions:
    return FP8GemmOptions(fp16_weight_storage=storage, materialize_fp8_on_wrap=eager)  # type: ignore[arg-type]


def strike_everywhere(
    storage: str, inplace: bool, eager: bool, *, step: int, lines: bool = False
) -> tuple[int, list[str]]:
    """Interrupts patching at every ``step``-th call; returns how often, and what was wrong afterwards."""
    faults: list[str] = []
    asked = options(storage, eager)
    handler = signal.getsignal(signal.SIGINT)
    for count, n in enumerate(range(1, 1_000_000, step)):
        watched = Watched()
        with striking(n, lines=lines) as struck:
            _, said = attempt(lambda: enable_fp8_gemm(watched.model, options=asked, inplace=inplace))  # noqa: B023
        if not struck:
            return count, faults
        found = watched.faults(said=said, exact=not inplace or storage != "discard")
        if signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)
            found.append("the handler of SIGINT stayed")
        faults += [f"{struck[0]}: {fault}" for fault in found]
    raise AssertionError("it never ends")


@by_setting
def test_an_exception_at_any_call_changes_nothing(storage: str, inplace: bool, eager: bool) -> None:
    count, faults = strike_everywhere(storage, inplace, eager, step=7)
    assert count > 20
    assert faults == []


@by_setting
def test_out_of_memory_changes_nothing(storage: str, inplace: bool, eager: bool, monkeypatch) -> None:
    real = packed.quantize_weight
    for n in range(6 if eager else 0):  # two Linears and two stacks of two
        watched, calls = Watched(), []

        def failing(*given: Any, n: int = n, calls: list[int] = calls, **named: Any) -> Any:
            calls.append(1)
            if len(calls) == n + 1:
                raise torch.OutOfMemoryError("no memory")
            return real(*given, **named)

        monkeypatch.setattr(packed, "quantize_weight", failing)
        error, said = attempt(
            lambda: enable_fp8_gemm(watched.model, options=options(storage, eager), inplace=inplace)  # noqa: B023
        )
        monkeypatch.undo()
        assert isinstance(error, torch.OutOfMemoryError)
        assert watched.faults(said=said, exact=not inplace or storage != "discard") == []


@contextlib.contextmanager
def storm(act: Callable[..., object], seed: int = 0) -> Iterator[None]:
    """Sends SIGINT repeatedly from another thread while ``act`` runs."""
    over, chance = False, random.Random(seed)

    def send() -> None:
        while not over:
            time.sleep(chance.random() * 0.003)
            os.kill(os.getpid(), signal.SIGINT)

    def interrupt(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is act.__code__:
                raise KeyboardInterrupt
            frame = frame.f_back

    before, interval = signal.signal(signal.SIGINT, interrupt), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        over = True
        thread.join()
        sys.setswitchinterval(interval)
        signal.signal(signal.SIGINT, before)


def weather(storage: str, inplace: bool, eager: bool, *, seconds: float, seed: int = 0) -> tuple[int, list[str]]:
    """Patches under repeated SIGINT for some seconds; returns the number of interrupts and what was wrong
    afterwards."""
    count, faults, end = 0, [], time.monotonic() + seconds
    with storm(enable_fp8_gemm, seed):
        while time.monotonic() < end:
            watched = Watched()
            error, said = attempt(
                lambda: enable_fp8_gemm(watched.model, options=options(storage, eager), inplace=inplace)  # noqa: B023
            )
            count += isinstance(error, KeyboardInterrupt)
            faults += watched.faults(said=said, exact=not inplace or storage != "discard")
    return count, faults


@by_setting
def test_a_storm_of_interrupts_changes_nothing(storage: str, inplace: bool, eager: bool) -> None:
    count, faults = weather(storage, inplace, eager, seconds=0.4)
    assert count > 0
    assert faults == []


@pytest.mark.parametrize("storage", ["keep", "discard"])
def test_undoing_that_is_interrupted_leaves_layers_that_run(storage: str) -> None:
    """A second call completes an interrupted undo, so that the model is what it was."""

    def undo(watched: Watched) -> None:
        attempt(lambda: disable_fp8_gemm(watched.model))
        assert watched.fp8() == []
        assert watched.faults(said=True, exact=storage == "keep") == []

    count, n = 0, 1
    while True:
        watched = Watched()
        enable_fp8_gemm(watched.model, options=options(storage, True))
        with striking(n) as struck:
            attempt(lambda: disable_fp8_gemm(watched.model))  # noqa: B023
        assert watched.runs() == [], struck
        undo(watched)
        if not struck:
            break
        count, n = count + 1, n + 3
    assert count > 20
    count, end = 0, time.monotonic() + 0.5
    with storm(disable_fp8_gemm):
        while time.monotonic() < end:
            watched = Watched()
            enable_fp8_gemm(watched.model, options=options(storage, True))
            error, _ = attempt(lambda: disable_fp8_gemm(watched.model))  # noqa: B023
            assert watched.runs() == []
            count += error is not None
            while watched.fp8():
                attempt(lambda: disable_fp8_gemm(watched.model))  # noqa: B023
    assert count > 0


@pytest.mark.parametrize("storage", ["keep", "discard"])
def test_what_was_fp8_before_stays_so(storage: str) -> None:
    """An interrupt reverts only what this call has changed, also in modules that were partly FP8 before."""
    for n in range(1, 1_000_000, 9):
        watched = Watched()
        enable_fp8_gemm(watched.model, module_filter=["first", "*gate_up_proj", "last"], options=options(storage, True))
        # an FP8Linear whose weight is dense
        watched.model.last._parameters["weight"] = watched.parameters["last.weight"]
        watched.parameters, watched.facts = dict(watched.model.named_parameters()), watched.look()
        watched.values = {name: parameter.clone() for name, parameter in watched.parameters.items()}
        before = watched.fp8()
        assert before == ["first.weight", "experts.gate_up_proj"]
        with striking(n) as struck:
            _, said = attempt(lambda: enable_fp8_gemm(watched.model, options=options(storage, True)))  # noqa: B023
        if not struck:
            break
        assert watched.runs() == [], struck
        if watched.fp8() == before:
            assert watched.look() == watched.facts, struck
            kept = [name for name in watched.parameters if storage == "keep" or name in before]
            now = dict(watched.model.named_parameters())
            assert all(now[name] is watched.parameters[name] for name in kept), struck
            equal = all(torch.equal(now[name], watched.values[name]) for name in now)
            assert equal or (said and storage == "discard"), struck
        else:
            assert len(watched.fp8()) == 4, struck
    assert n > 100


@pytest.mark.parametrize("room", [True, False])
def test_a_note_where_warnings_are_errors(room: bool, monkeypatch) -> None:
    """The interrupt itself propagates and reports its cost; a layer that cannot be dequantized stays FP8."""
    watched, real = Watched(), packed.quantize_weight

    def failing(w: torch.Tensor, *given: Any, **named: Any) -> Any:
        if w.shape[0] == 64:  # the stack, which is converted after the first Linear
            raise torch.OutOfMemoryError("no memory")
        return real(w, *given, **named)

    def full(weight: FP8Weight) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(packed, "quantize_weight", failing)
    if not room:
        monkeypatch.setattr(FP8Weight, "dequantize", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        enable_fp8_gemm(watched.model)
    monkeypatch.undo()
    assert watched.runs() == []
    assert watched.fp8() == ([] if room else ["first.weight"])
    if sys.version_info >= (3, 11):
        assert ("1 of 5 layers" if room else "and 1 stay FP8 for lack of memory") in caught.value.__notes__[0]
