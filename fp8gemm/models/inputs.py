"""The activations that the products with a model's weights are given, dense or FP8, whichever module multiplies.

A dispatch mode sees every product below autograd, as in ``observation``: ``F.linear`` with a head that is tied to an
embedding, slices of packed projections, experts taken out of their stack. Weights are told by their storage, or by
their home, and the view of a weight tells which of its rows, columns and experts are multiplied.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..weights import FP8Weight
from ..weights.convolution import patches
from ..weights.geometry import Layout, Part, part_of
from .batches import Batch, evaluating
from .multiplies import factors_of, packet_of

aten = torch.ops.aten

# The products whose first factor is multiplied by the transpose of the second, of any dtype.
_TRANSPOSED = (aten.linear,)
_VECTORS = (aten.mv, aten.addmv, aten.addmv_)


@dataclass(frozen=True)
class Given:
    """The activations ``x [T, K]`` of one product, and the columns and the expert of the weight that multiply them."""

    x: torch.Tensor
    first_column: int = 0
    expert: int = 0


Note = Callable[[str, Given], None]


class Inputs(TorchDispatchMode):
    """Calls ``note(name, given)`` for each product with a weight while it is the innermost mode.

    ``weights`` are the parameters to look for, with their layouts, by the names under which they are noted. Products
    that cannot be told apart, such as those with experts gathered from a stack, are not noted.
    """

    def __init__(self, weights: Mapping[str, tuple[torch.Tensor, Layout]], note: Note) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.note = note
        self.layouts = {name: layout for name, (_, layout) in weights.items()}
        self.homes: dict[int, str] = {}
        self.fp8: dict[str, FP8Weight] = {}
        self.ranges: dict[int, list[tuple[int, int, str]]] = defaultdict(list)  # by storage: begin, end, weight
        self.casts: dict[int, tuple[StorageWeakRef, str, int]] = {}  # by storage: where the weight begins in it
        for name, (weight, _) in weights.items():
            if isinstance(weight, FP8Weight):
                self.homes[id(weight._home)], self.fp8[name] = name, weight
            elif type(weight) in (nn.Parameter, torch.Tensor):
                begin = int(weight.storage_offset())
                self.ranges[weight.untyped_storage()._cdata].append((begin, begin + weight.numel(), name))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As for ``Observer``."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default:
            self._remember_cast(args[0], y)
        elif func is aten.convolution.default:
            self._note_windows(args[0], args[1], transposed=bool(args[6]))
        else:
            factors = factors_of(func, args)
            if len(factors) == 2:
                self._note_factors(func, factors[0], factors[1], args)
        return y

    def _place(self, tensor: Any) -> tuple[str, int] | None:
        """The weight that a tensor is or is a view of, and the offset of the view in it."""
        if isinstance(tensor, FP8Weight):
            name = self.homes.get(id(tensor._home)) or self._name_of_cast(tensor)
            return None if name is None else (name, tensor.offset)
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return None
        storage, offset = tensor.untyped_storage()._cdata, int(tensor.storage_offset())
        for begin, end, name in self.ranges.get(storage, ()):
            if begin <= offset < end:
                return name, offset - begin
        cast = self.casts.get(storage)
        if cast is None or cast[0].expired():  # type: ignore[no-untyped-call]
            return None
        return cast[1], offset - cast[2]

    def _name_of_cast(self, tensor: FP8Weight) -> str | None:
        """The weight of which another home has the same bytes, as after a cast."""
        stored = tensor._home.stored
        same = (name for name, weight in self.fp8.items() if stored is not None and weight._home.stored is stored)
        return next(same, None)

    def _remember_cast(self, tensor: Any, made: Any) -> None:
        found = self._place(tensor)
        if found is not None and type(made) is torch.Tensor and made.stride() == tensor.stride():
            storage, begin = made.untyped_storage(), int(made.storage_offset()) - found[1]
            self.casts[storage._cdata] = (StorageWeakRef(storage), found[0], begin)  # type: ignore[no-untyped-call]

    def _note_factors(self, func: Any, a: Any, b: Any, args: tuple[Any, ...]) -> None:
        """``a`` is contracted over its last dimension, ``b`` over its second to last."""
        packet = packet_of(func)
        if packet in _TRANSPOSED:
            b = b.transpose(-1, -2)
        right, left = self._place(b), self._place(a)
        if (right is None) == (left is None):  # no weight, or nothing else
            return
        if right is not None:
            ends = args[2] if packet is aten._grouped_mm and len(args) > 2 else None
            self._note_product(*right, b, a, contracted_first=True, ends=ends)
        elif left is not None and packet not in (aten._grouped_mm, aten.dot):
            x = b.unsqueeze(0) if packet in _VECTORS else b.transpose(-1, -2)
            self._note_product(*left, a, x, contracted_first=False)

    def _note_product(
        self,
        name: str,
        offset: int,
        view: torch.Tensor,
        x: torch.Tensor,
        *,
        contracted_first: bool,
        ends: torch.Tensor | None = None,
    ) -> None:
        """Notes ``x [..., T, K]`` for a view ``[..., K, N]`` of a weight, or ``[..., N, K]`` otherwise."""
        size, stride = tuple(view.shape), tuple(view.stride())
        if len(size) == 3 and (stride[0] == 0 or size[0] == 1) and ends is None:  # one matrix for the whole batch
            size, stride, x = size[1:], stride[1:], x.flatten(0, -2)
        part = part_of(self.layouts[name], size, stride, offset) if len(size) in (2, 3) else None
        if part is None or part.cols[1] != x.shape[-1]:
            return  # not a rectangle of the weight, or contracted over its rows
        if part.flipped != contracted_first and 1 not in size[-2:]:
            return
        for expert, tokens in _by_expert(part, x, ends):
            self.note(name, Given(tokens, part.cols[0], expert))

    def _note_windows(self, x: torch.Tensor, weight: Any, *, transposed: bool) -> None:
        found = self._place(weight)
        if found is None or x.dim() != weight.dim():
            return
        rows = x.movedim(1, -1).flatten(0, -2) if transposed else patches(x, tuple(weight.shape[2:]))[0]
        if rows.shape[-1] == self.layouts[found[0]].shape[-1]:
            self.note(found[0], Given(rows))


def _by_expert(part: Part, x: torch.Tensor, ends: torch.Tensor | None) -> Iterator[tuple[int, torch.Tensor]]:
    """The tokens ``[T, K]`` of each expert that a part of a stack consists of; 0 for a matrix."""
    first, count = part.experts or (0, 1)
    if ends is not None:
        start = 0
        for expert, end in enumerate(ends.tolist(), start=first):
            yield expert, x[start:end]
            start = end
    elif x.dim() == 3 and part.experts is not None and not part.single and count == x.shape[0]:
        yield from enumerate(x, start=first)
    elif count == 1:
        yield first, x.reshape(-1, x.shape[-1])


def run(model: nn.Module, inputs: list[Batch], weights: Mapping[str, tuple[torch.Tensor, Layout]], note: Note) -> None:
    """Runs a model on batches, in evaluation mode and without gradients, and notes the inputs of its products."""
    with evaluating(model), uncompiled():
        for batch in inputs:
            with Inputs(weights, note):
                batch.run(model)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it, compiled code runs in eager, and torch's attention layers do step by step what they do."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # nothing was compiled otherwise
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(unfused())
        yield


@contextmanager
def unfused() -> Iterator[None]:
    """Within it, torch's attention layers do step by step what they do, and not in one operation."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
