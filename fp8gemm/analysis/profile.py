"""One forward pass of a dense model as a list of matrix products, with the time of what stays as it is."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from ..models.multiplies import factors_of, is_layer, multiply_adds, tokens
from ..models.observation import Observer
from ..models.owners import is_plain_linear
from ..models.selection import Conversion
from ..scaled import FP8GemmOptions
from ..weights.geometry import Layout

aten = torch.ops.aten
Clock = Callable[[], float]  # seconds since any moment, when all work so far is done
Kind = Literal["layer", "linear", "batched", "grouped", "convolution"]

_ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_attention")
_SOFTMAX = ("_softmax", "_safe_softmax")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A weight as far as the speed of its products depends on it."""

    kind: Kind
    options: FP8GemmOptions
    parameter: str  # its own name in its module, as the granularity of stacks depends on it
    layout: Layout
    dtype: torch.dtype
    device: torch.device
    bias: bool = False
    trains: bool = False  # autocast keeps the casts of parameters that require gradients

    @property
    def nbytes(self) -> int:
        """Bytes of the dense weight."""
        count = self.dtype.itemsize
        for size in self.layout.shape:
            count *= size
        return count


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A product with a weight: ``kind`` of its geometry says which function computes it.

    ``x`` is the shape of the activations, ``settings`` what the function takes besides: the ends of the experts' rows,
    or stride, padding and so on of a convolution.
    """

    geometry: Geometry
    x: tuple[int, ...]
    x_dtype: torch.dtype
    tokens: int
    settings: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Profile:
    """What one forward pass did: the products that would be converted, in order, each with its step of the plan, and
    the seconds of attention and of products with weights that stay dense, by the parameter's name."""

    calls: tuple[tuple[Conversion, Problem], ...]
    attention: float
    kept: dict[str, float] = field(default_factory=dict)


class Recorder(Observer):  # type: ignore[no-untyped-call]
    """Records products and times operations one by one, each without what the recorder itself does."""

    def __init__(self, model: nn.Module, steps: Sequence[Conversion], options: FP8GemmOptions, clock: Clock) -> None:
        super().__init__(model)
        self.options, self.clock = options, clock
        self.steps = {id(step.module._parameters[step.parameter]): step for step in steps if step.converts}
        self.inside: tuple[nn.Module, torch.Tensor | None] | None = None  # the Linear that runs, and its input
        self.calls: list[tuple[Conversion, Problem]] = []
        self.attention = 0.0
        self.kept: dict[str, float] = defaultdict(float)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hooks of all modules tell when a Linear runs; none is put into a module."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        torch.clear_autocast_cache()  # of casts that were made before, whose parameters could not be told
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if is_plain_linear(module):
            self.inside = (module, args[0] if args and isinstance(args[0], torch.Tensor) else None)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.inside = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        start = self.clock()
        y = func(*args, **kwargs)
        took = self.clock() - start
        factors = [(factor, self.source(factor)) for factor in factors_of(func, args)]
        named = [(factor, name) for factor, name in factors if name is not None]
        if named:
            self._product(func, args, kwargs, y, named, took)
        elif factors or _is_attention(func, y):
            self.attention += took
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        sources = [self.source(tensor) for tensor in tensors]
        if sources and None not in sources:
            for made in tree_leaves(y):
                self.derive(made, sources[0] or "")
        return y

    def _product(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        y: Any,
        named: list[tuple[torch.Tensor, str]],
        took: float,
    ) -> None:
        converting = [(factor, step) for factor, name in named if (step := self._step(name)) is not None]
        if not converting:
            self.kept[named[0][1]] += took
        for factor, step in converting if is_layer(func) else converting[:1]:
            self.calls.append((step, self._problem(step, func, args, kwargs, y, factor)))

    def _step(self, name: str) -> Conversion | None:
        return self.steps.get(id(self.parameters[name]))

    def _problem(
        self, step: Conversion, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any, factor: torch.Tensor
    ) -> Problem:
        layout, first = step.layout, args[0]
        n, k = layout.matrix
        kind: Kind = "linear"
        bias = func is aten.addmm.default and first.dim() == 1
        settings: tuple[Any, ...] = ()
        stack = layout.shape[0] if len(layout.shape) == 3 else 0
        if func is aten._grouped_mm.default and stack:
            ends = args[2] if len(args) > 2 else kwargs.get("offs")
            kind, shape, m = "grouped", tuple(first.shape), tokens(first)
            settings = tuple(ends.tolist()) if ends is not None else ()
        elif func in (aten.bmm.default, aten.baddbmm.default) and stack and factor.shape[0] == stack:
            kind, m = "batched", int(y.numel() // n)
            shape = (stack, m // stack, k)
        elif func is aten.convolution.default:
            kind, bias, shape = "convolution", args[2] is not None, tuple(first.shape)
            m = multiply_adds(func, args, y) // (n * k)
            settings = tuple(tuple(one) if isinstance(one, (list, tuple)) else one for one in args[3:9])
        else:
            rows = max(1, factor.numel() // k) if not is_layer(func) else n * max(stack, 1)
            m = tokens(first) if is_layer(func) else multiply_adds(func, args, y) // (rows * k)
            bias, shape = bias or is_layer(func), (m, k)
            layout = Layout.of((k, rows) if layout.turned else (rows, k), turned=layout.turned)
        dtype, x_dtype = factor.dtype, factor.dtype
        if self.inside is not None and self.inside[0] is step.module and step.parameter == "weight":
            kind, bias, given = "layer", step.module._parameters.get("bias") is not None, self.inside[1]
            dtype = step.module._parameters["weight"].dtype  # type: ignore[union-attr]
            shape, x_dtype = (shape, dtype) if given is None else (tuple(given.shape), given.dtype)
        geometry = Geometry(
            kind=kind,
            options=step.effective(self.options),
            parameter=step.parameter,
            layout=layout,
            dtype=dtype,
            device=factor.device,
            bias=bias,
            trains=step.module._parameters[step.parameter].requires_grad,  # type: ignore[union-attr]
        )
        return Problem(geometry=geometry, x=shape, x_dtype=x_dtype, tokens=m, settings=settings)


def _is_attention(func: Any, y: Any) -> bool:
    """Whether an operation is attention itself, or the softmax of scores ``[B, heads, T, T]``."""
    name = func.name().partition("::")[2]
    scores = isinstance(y, torch.Tensor) and y.dim() >= 4
    return name.startswith(_ATTENTION) or (name.partition(".")[0] in _SOFTMAX and scores)


def counted(calls: Sequence[tuple[Conversion, Problem]]) -> dict[int, Counter[Problem]]:
    """How often each weight is multiplied in each way, by the id of its step of the plan."""
    found: dict[int, Counter[Problem]] = defaultdict(Counter)
    for step, problem in calls:
        found[id(step)][problem] += 1
    return found
