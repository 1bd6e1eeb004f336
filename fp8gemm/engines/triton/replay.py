# mypy: ignore-errors
# Triton is untyped, and not installed everywhere.
"""Recording the launches of a product and replaying them on other tensors of the same shapes, without planning.

A ``Tape`` is a recording. While one is being recorded, ``empty`` notes allocations, ``launch`` kernels, and ``call``
torch functions. Each argument is identified by its memory: the activations, an allocation, or the weight. A product
that uses any other memory is not recorded, so a replay never uses a tensor that was freed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.runtime import driver

from .counters import counters

_local = threading.local()


class NotReplayable(Exception):
    """The product uses memory, or runs something, that a tape cannot record."""


def recording() -> Tape | None:
    """The tape that this thread is recording; None if it is not."""
    return getattr(_local, "tape", None)


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.empty``, noted by the tape that is being recorded."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    tape = recording()
    if tape is not None:
        tape.tensors.append(tensor)
    return tensor


def split_counters(count: int, device: torch.device) -> torch.Tensor:
    """The counters of a split product of ``count`` tiles, noted by the tape that is being recorded."""
    tensor = counters(count, device)
    tape = recording()
    if tape is not None:
        tape.counters[_memory(tensor)] = count
    return tensor


def call(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """``function(*args, **kwargs)``, which allocates its result; noted by the tape that is being recorded."""
    y = function(*args, **kwargs)
    tape = recording()
    if tape is not None:
        tape.note_call(function, args, kwargs, y)
    return y


def record(
    product: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    fixed: tuple[torch.Tensor, ...],
    shape: tuple[int, ...],
) -> Tape | None:
    """Runs ``product(x [M, K])`` once and records it; None if it cannot be recorded.

    Args:
        fixed: the weight, its scales and the bias, which must stay in their memory as long as the tape is used.
        shape: the shape of the result, with as many elements as ``product`` returns.
    """
    tape = Tape(x=x, fixed=frozenset(_memory(tensor) for tensor in fixed))
    _local.tape = tape
    try:
        y = product(x)
        tape.finish(y, shape)
    except NotReplayable:
        return None
    finally:
        _local.tape = None
    return tape


@dataclass(eq=False)
class Step:
    """One launch: its arguments, and which of them are replaced in each replay."""

    run: Callable[..., None]
    args: list[Any] = field(default_factory=list)
    pointers: list[tuple[int, int, int]] = field(default_factory=list)  # (argument, tensor, offset in bytes)
    descriptors: list[tuple[int, int, list[int]]] = field(default_factory=list)  # (argument, tensor, block)
    counters: list[tuple[int, int]] = field(default_factory=list)  # (argument, tiles)


@dataclass(eq=False)
class Call:
    """One torch function: its arguments, the memory of those that are replaced in each replay, and its result."""

    run: Callable[..., torch.Tensor]
    args: list[Any]
    kwargs: dict[str, Any]
    tensors: list[tuple[int, int, tuple[int, ...], tuple[int, ...], int]]  # (argument, tensor, ...)
    result: int


class Tape:
    """A recording, callable: ``x [..., K]``, contiguous and aligned like the recorded one, to ``y [..., N]``."""

    def __init__(self, *, x: torch.Tensor, fixed: frozenset[int]) -> None:
        self.device, self.on_card, self.fixed = x.device, x.is_cuda, fixed
        self.tensors = [x]  # recorded: x, then the allocations
        self.counters: dict[int, int] = {}  # tiles, by the memory of the latest counters
        self.steps: list[Step | Call] = []
        self.made: list[tuple[tuple[int, ...], torch.dtype] | None] = []  # None: the result of a call
        self.result, self.shape = 0, ()

    def note(self, compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Notes a launch of ``compiled`` (None in the interpreter) with all its arguments in order."""
        if compiled is None:
            raise NotReplayable
        step = Step(run=compiled[grid])
        for place, arg in enumerate(args):
            step.args.append(self._resolve(step, place, arg))
        self.steps.append(step)

    def note_call(
        self, function: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], y: torch.Tensor
    ) -> None:
        """Notes a call of a function; its keyword arguments must not be activations."""
        noted = Call(run=function, args=[], kwargs=kwargs, tensors=[], result=len(self.tensors))
        for place, arg in enumerate(args):
            slot = self._slot(arg) if isinstance(arg, torch.Tensor) else None
            noted.args.append(arg if slot is None else None)
            if slot is not None:
                start = (arg.data_ptr() - self.tensors[slot].data_ptr()) // arg.itemsize
                noted.tensors.append((place, slot, tuple(arg.shape), arg.stride(), start))
        for arg in kwargs.values():
            if isinstance(arg, torch.Tensor) and self._slot(arg) is not None:
                raise NotReplayable
        self.steps.append(noted)
        self.tensors.append(y)

    def _slot(self, tensor: torch.Tensor) -> int | None:
        """The index of the recorded tensor whose memory this one shares; None for the weight."""
        memory = _memory(tensor)
        slot = next((slot for slot, known in enumerate(self.tensors) if _memory(known) == memory), None)
        if slot is None and memory not in self.fixed:
            raise NotReplayable
        return slot

    def _resolve(self, step: Step, place: int, arg: Any) -> Any:
        """The argument if it is the same in each replay, else None."""
        tensor = getattr(arg, "base", arg)
        if not isinstance(tensor, torch.Tensor):
            return arg
        if tensor.dtype == torch.int32 and (tiles := self.counters.get(_memory(tensor))) is not None:
            step.counters.append((place, tiles))
            return None
        slot = self._slot(tensor)
        if slot is None:
            return arg.data_ptr() if tensor is arg else arg
        if tensor is arg:
            step.pointers.append((place, slot, tensor.data_ptr() - self.tensors[slot].data_ptr()))
        elif tensor is self.tensors[slot]:
            step.descriptors.append((place, slot, list(arg.block_shape)))
        else:
            raise NotReplayable
        return None

    def finish(self, y: torch.Tensor, shape: tuple[int, ...]) -> None:
        """Ends the recording; ``y`` is the product's result."""
        self.result = next((slot for slot, known in enumerate(self.tensors) if known is y), 0)
        if self.result == 0 or not self.steps:
            raise NotReplayable
        given = {step.result for step in self.steps if isinstance(step, Call)}
        self.made = [
            None if slot in given else (tuple(tensor.shape), tensor.dtype)
            for slot, tensor in enumerate(self.tensors)
            if slot > 0
        ]
        if self.result not in given:
            self.made[self.result - 1] = (shape, y.dtype)
        self.tensors, self.shape = [], shape

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        device, stream = self.device, None
        if self.on_card:
            if device.index != driver.active.get_current_device():
                with torch.cuda.device(device):
                    return self(x)
            stream = driver.active.get_current_stream(device.index)
        tensors = [x]
        for made in self.made:
            tensors.append(x if made is None else torch.empty(made[0], dtype=made[1], device=device))
        for step in self.steps:
            args = step.args.copy()
            if isinstance(step, Call):
                for place, slot, size, stride, start in step.tensors:
                    tensor = tensors[slot]
                    args[place] = tensor.as_strided(size, stride, tensor.storage_offset() + start)
                tensors[step.result] = step.run(*args, **step.kwargs)
                continue
            for place, slot, offset in step.pointers:
                args[place] = tensors[slot].data_ptr() + offset
            for place, slot, block in step.descriptors:
                args[place] = descriptor(tensors[slot], block)
            own = [counters(tiles, device) for _, tiles in step.counters]
            for (place, _), zeros in zip(step.counters, own, strict=True):
                args[place] = zeros.data_ptr()
            step.run(*args, stream=stream)
        y = tensors[self.result]
        return y if y.shape == self.shape else y.view(self.shape)


def descriptor(tensor: torch.Tensor, block: list[int]) -> Any:
    """A TMA descriptor for a tensor ``[rows, K]``, which loads tiles of size ``block``."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, block)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
