"""Observing a forward pass: which multiply-adds ran on FP8 or on dense weights, and how each parameter was used.

A dispatch mode sees every operation below autograd. Operands are identified by their storage, so views of parameters,
and values computed from parameters alone (a cast, a norm), count as those parameters.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..scaled import FP8_DTYPES
from ..weights import FP8Weight
from ..weights.geometry import Layout
from ..weights.report import Coverage
from .batches import Batch, evaluating
from .multiplies import factors_of, is_layer, is_view, multiply_adds, packet_of, tokens
from .owners import Role

aten = torch.ops.aten


@dataclass
class Seen:
    """How one parameter was used: which of its dimensions were contracted by products, and other uses."""

    contracted: set[tuple[int, int]] = field(default_factory=set)  # dimension, extent
    looked_up: bool = False
    others: list[str] = field(default_factory=list)


class Observer(TorchDispatchMode):
    """Counts multiply-adds with the parameters of a model while it is the innermost mode."""

    counts_operations = True  # products that autograd records may come as the registered operation

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.over = False  # whether the observed pass has ended
        self.failed = False
        self.names: dict[int, list[tuple[int, int, str]]] = defaultdict(list)  # by storage: begin, end, parameter
        self.parameters: dict[str, nn.Parameter] = {}
        self.derived: dict[int, tuple[StorageWeakRef, str]] = {}
        self.weights: dict[str, FP8Weight] = {}
        self.homes: dict[int, str] = {}  # by the id of the home
        self.addresses: dict[int, str] = {}  # by the address of the bytes when they were last looked for
        self.uses: dict[str, Seen] = defaultdict(Seen)
        self.fp8: dict[str, int] = defaultdict(int)
        self.dequantized: dict[str, int] = defaultdict(int)
        self.dense: dict[str, int] = defaultdict(int)
        for name, parameter in model.named_parameters():
            if isinstance(parameter, FP8Weight):
                self.homes[id(parameter._home)] = name
                self.weights[name] = parameter
            elif type(parameter) is nn.Parameter:
                self.parameters[name] = parameter
                begin = int(parameter.storage_offset())
                entry = (begin, begin + parameter.numel(), name)
                self.names[parameter.untyped_storage()._cdata].append(entry)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Allows torch.compile under the mode; otherwise, code first called under a mode would never be compiled."""
        return True

    def coverage(self) -> Coverage:
        """The counts so far."""
        return Coverage(fp8=dict(self.fp8), dense=dict(self.dense), dequantized=dict(self.dequantized))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.over:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        weights = [tensor for tensor in tensors if isinstance(tensor, FP8Weight)]
        if weights:
            return self.of_fp8(func, args, kwargs, tensors, weights)
        y = func(*args, **kwargs)
        if packet_of(func) in (torch.ops.fp8gemm.linear, torch.ops.fp8gemm.grouped):
            # in a compiled region, or recorded by autograd
            data = next(tensor for tensor in tensors if tensor.dtype in FP8_DTYPES)
            self.fp8[self.name_of(data.data_ptr())] += y.numel() * args[0].shape[-1]
            return y
        sources = [self.source(tensor) for tensor in tensors]
        named = [name for name in sources if name is not None]
        if named:
            try:
                self.of_dense(func, args, kwargs, y, tensors, sources)
            except Exception as error:  # counting must not end the user's forward
                self.give_up(func, error)
            if len(named) == len(sources):
                for made in tree_leaves(y):
                    self.derive(made, named[0])
        return y

    def name_of(self, address: int) -> str:
        """The parameter whose FP8 bytes are at an address. During the pass bytes are quantized and packed, and memory
        that held one weight is used for another."""
        name = self.addresses.get(address)
        if name is None or address not in _addresses(self.weights[name]):
            self.addresses = {at: name for name, weight in self.weights.items() for at in _addresses(weight)}
            name = self.addresses.get(address)
        return "another weight" if name is None else name

    def give_up(self, func: Any, error: Exception) -> None:
        """Forgets what was observed: the report has no coverage, and no parameter is taken for a factor of products."""
        warnings.warn(
            f"the multiply-adds of {func} cannot be counted, so the coverage of this forward is not known: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        self.over, self.failed = True, True
        for table in (self.uses, self.fp8, self.dequantized, self.dense):
            table.clear()

    def source(self, tensor: torch.Tensor) -> str | None:
        """The parameter that a tensor is, is a view of, or was computed from alone."""
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return None
        storage = tensor.untyped_storage()._cdata
        for begin, end, name in self.names.get(storage, ()):
            if begin <= tensor.storage_offset() < end:
                return name
        found = self.derived.get(storage)
        return found[1] if found is not None and not found[0].expired() else None  # type: ignore[no-untyped-call]

    def derive(self, made: Any, name: str) -> None:
        if type(made) is torch.Tensor and made.layout is torch.strided and self.source(made) is None:
            storage = made.untyped_storage()
            self.derived[storage._cdata] = (StorageWeakRef(storage), name)  # type: ignore[no-untyped-call]

    def of_fp8(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[torch.Tensor],
        weights: Sequence[FP8Weight],
    ) -> Any:
        home = weights[0]._home
        home = getattr(home, "source", None) or home
        before = home.activity.dequantizations
        y = func(*args, **kwargs)
        name = self.homes.get(id(home)) or self.name_of(FP8Weight(home, weights[0].dtype).data_ptr())  # perhaps cast
        try:
            count = multiply_adds(func, args, y)
        except Exception as error:
            self.give_up(func, error)
            return y
        if count:
            table = self.fp8 if home.activity.dequantizations == before else self.dequantized
            table = self.dense if home.precision == "original" else table
            table[name] += count
        elif all(isinstance(tensor, FP8Weight) or self.source(tensor) is not None for tensor in tensors):
            for made in tree_leaves(y):  # dequantized values
                self.derive(made, name)
        return y

    def of_dense(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        y: Any,
        tensors: Sequence[torch.Tensor],
        sources: Sequence[str | None],
    ) -> None:
        factors = factors_of(func, args)
        matrices = [name for factor in factors if (name := self.source(factor)) is not None]
        counts = dict.fromkeys(matrices[:1], multiply_adds(func, args, y))
        if is_layer(func):
            counts = {name: tokens(args[0]) * self.parameters[name].numel() for name in matrices}
        for name, count in counts.items():
            table = self.dense if name in self.parameters else self.dequantized
            table[name] += count
        for tensor, name in zip(tensors, sources, strict=True):
            if name is not None and tensor.untyped_storage()._cdata in self.names:
                self.note(func, args, tensor, name, factors)

    def note(self, func: Any, args: tuple[Any, ...], tensor: torch.Tensor, name: str, factors: list[Any]) -> None:
        """Notes how an operation used a parameter directly."""
        seen, parameter = self.uses[name], self.parameters[name]
        if is_layer(func):  # which would multiply by dense values
            seen.others.append(str(func))
            return
        for place, factor in enumerate(factors):
            if factor is tensor:
                axis = _contracted(func, place, tensor, parameter)
                if axis is None:
                    seen.others.append(str(func))
                else:
                    seen.contracted.add(axis)
                return
        if func is aten.embedding.default and args[0] is tensor:
            seen.looked_up = True
        elif not is_view(func):
            seen.others.append(str(func))

    def roles(self) -> dict[str, Role]:
        """The parameters that were used only as factors of products, by name, with their roles."""
        found = {}
        for name, seen in self.uses.items():
            layout = _layout(self.parameters[name], seen)
            if layout is not None:
                found[name] = Role(layout, multiplied=True, looked_up=seen.looked_up)
        return found


def _addresses(weight: FP8Weight) -> list[int]:
    """Where a weight's FP8 bytes are, in every form in which they are held."""
    stored = weight._home.stored
    forms = () if stored is None else (stored.plain, stored.packed, *stored.forms.values())
    return [form.data.data_ptr() for form in forms if form is not None]


def _layout(parameter: nn.Parameter, seen: Seen) -> Layout | None:
    """How a parameter's memory is a matrix, or a stack of matrices, for the products in which it was observed."""
    if seen.others or len(seen.contracted) != 1 or parameter.dim() not in (2, 3) or not parameter.is_contiguous():
        return None
    ((axis, extent),) = seen.contracted
    size = tuple(parameter.shape)
    turned = axis == parameter.dim() - 2
    if extent == size[axis]:
        return Layout.of(size, turned=turned)
    if parameter.dim() == 2 and turned and size[0] % extent == 0:  # experts concatenated along the rows
        return Layout.of((size[0] // extent, extent, size[1]), turned=True, folded=size)
    return None


def _contracted(func: Any, place: int, factor: torch.Tensor, parameter: nn.Parameter) -> tuple[int, int] | None:
    """Which dimension of a parameter a product contracts, and its extent; None if that cannot be determined."""
    if factor.dim() < 2 or parameter.dim() not in (2, 3) or not parameter.is_contiguous():
        return None
    # The first factor of a product is contracted over its last dimension, the second over its second to last.
    axis = factor.dim() - 1 - (0 if packet_of(func) in (aten.linear, aten.mv) else place)
    step, extent = factor.stride(axis), factor.shape[axis]
    across = factor.stride(2 * factor.dim() - 3 - axis)
    inner = parameter.shape[-1]
    if step == 1 and extent == inner and (across % inner == 0):
        return parameter.dim() - 1, extent
    if step == inner and across == 1:
        return parameter.dim() - 2, extent
    return None


def watch(model: nn.Module, inputs: object) -> Observer:
    """Runs ``model`` on example inputs, without gradients and in evaluation mode, and observes it.

    ``inputs`` is a tensor, a tuple of positional arguments, or a mapping of keyword arguments. The state of the random
    number generators is restored afterwards.
    """
    observer = Observer(model)
    with evaluating(model), observer:
        Batch.of(inputs).run(model)
    return observer
