"""``FP8Weight``: a parameter stored in FP8 that behaves like the dense parameter it replaced; also its views."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from .. import native
from ..engines import PackedWeight
from ..errors import UnsupportedError
from ..scaled import FP8_DTYPES, ScaledTensor, Scheme
from .activity import Activity
from .dispatch import FUNCTIONS, OPERATIONS
from .geometry import Part, part_of
from .home import Home
from .precision import carry_over
from .sharding import Shardable
from .stored import lock
from .tracing import Flatten, flatten_home, graph_key, never_traced, unflatten_home
from .values import read
from .watching import warn_of_traces

Geometry = tuple[tuple[int, ...], tuple[int, ...], int]  # size, stride, offset, in elements


class FP8Weight(Shardable, torch.Tensor):
    """A weight ``[N, K]``, its transpose, a stack of weights, or a view of one: FP8 bytes that look like dense values.

    It has the shape, strides, dtype and device of the dense tensor, but no memory of that dtype. Matrix products with
    it run on FP8, any other read gives the dequantized values, and a write to it or to a view of it changes the weight.

    The wrapper holds only a geometry. Bytes, scales, pending writes and the packed weights of engines are in its
    ``Home``, which all views and aliases of the weight share, as tensors share a storage.

    Example:
        >>> from fp8gemm import enable_fp8_gemm
        >>> layer = enable_fp8_gemm(torch.nn.Linear(64, 32))
        >>> with torch.no_grad():
        ...     layer.weight[0] = 0.5
        >>> layer.weight[0, :3], isinstance(layer.weight, torch.nn.Parameter)
        (FP8Weight([0.5000, 0.5000, 0.5000], weight row, activation row), True)
    """

    _home: Home
    _fresh: bool
    _source: FP8Weight  # the tensor it was detached from, whose version counter counts its writes
    _by_value: bool  # of ``data`` and its views: products with it take the original, where that is kept
    _flattened: tuple[Any, tuple[list[str], Any]]  # the result of ``_flatten`` for the home's current ``flat``
    _is_param: bool

    @staticmethod
    def __new__(
        cls,
        home: Home | torch.Tensor,
        dtype: torch.dtype | None = None,
        size: tuple[int, ...] | None = None,
        stride: tuple[int, ...] | None = None,
        offset: int = 0,
        requires_grad: bool = False,
    ) -> FP8Weight:
        if isinstance(home, torch.Tensor):
            return _parameter_of(home, requires_grad)  # type: ignore[no-any-return]
        weight: FP8Weight = torch.Tensor._make_wrapper_subclass(
            cls,
            home.layout.size if size is None else size,
            strides=home.layout.stride if stride is None else stride,
            storage_offset=offset,
            dtype=dtype,
            device=home.device,
            requires_grad=False,
        )
        weight._home = home
        torch._C._set_throw_on_mutable_data_ptr(weight)  # there is no memory; asking for its address raises
        return weight

    def like(
        self, geometry: Geometry | None = None, *, home: Home | None = None, dtype: torch.dtype | None = None
    ) -> FP8Weight:
        """A wrapper of this home, or of another, with another geometry or dtype; copies nothing."""
        size, stride, offset = geometry or (tuple(self.size()), self.stride(), self.offset)
        # Writes through an inference tensor are not counted for tensors made outside of inference mode, so make a
        # normal one.
        leave = torch.is_inference_mode_enabled() and not self.is_inference()
        with torch.inference_mode(mode=False) if leave else contextlib.nullcontext():
            twin = FP8Weight(home or self._home, dtype or self.dtype, size, stride, offset)
        if home is None and (source := self.__dict__.get("_source")) is not None:
            twin._source = source
        if "_by_value" in self.__dict__:
            twin._by_value = True
        return twin

    def turned_around(self) -> FP8Weight:
        """The weight with its last two dimensions transposed."""
        *stack, a, b = self.size()
        *steps, step_a, step_b = self.stride()
        return self.like(((*stack, b, a), (*steps, step_b, step_a), self.offset))

    def geometry_of(self, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """The result of a view operation on this geometry, computed on a meta tensor."""
        with _disable_current_modes():
            total = max(self._home.layout.stride[0] * self._home.layout.size[0], 1)
            base = torch.empty(total, dtype=self.dtype, device="meta")
            view = base.as_strided(self.size(), self.stride(), self.offset)
            return func(view, *args, **kwargs)

    @property
    def offset(self) -> int:
        """The storage offset in elements, which is never symbolic here."""
        return self.storage_offset()  # type: ignore[return-value]

    def part(self) -> Part | None:
        """The rows, columns and experts of the stored weight that this view covers; None if it is not a rectangle."""
        return part_of(self._home.layout, self.size(), self.stride(), self.offset)

    def as_parameter(self) -> Any:
        """This same object, marked as an nn.Parameter."""
        self._is_param = True
        return self

    def is_whole(self) -> bool:
        """Whether this is the whole weight in its own layout, as its owner holds it, and not a smaller view."""
        layout = self._home.layout
        return self.size() == layout.size and (self.stride() == layout.stride or self.numel() <= 1)

    def dequantize(self) -> torch.Tensor:
        """The dense values in new memory; counted as a dequantization in the report."""
        with torch._C.DisableTorchFunctionSubclass():
            return read(self._home, self.size(), self.stride(), self.offset, self.dtype)

    def scaled(self) -> ScaledTensor:
        """The FP8 bytes ``[(E,) N, K]`` and float32 scales of the whole weight; quantizes first if values are
        pending."""
        return self._home.scaled().detach()

    @property
    def activity(self) -> Activity:
        """Counts of products, kernels and dequantizations."""
        return self._home.activity

    @property
    def scheme(self) -> Scheme:
        """How the weight is scaled, and how activations are quantized."""
        return self._home.scheme

    @property
    def engine(self) -> str | None:
        """The name of the engine that runs it on its device; None before one was chosen."""
        return self._home.engine

    @property
    def data(self) -> torch.Tensor:
        if isinstance(self, nn.Parameter):
            self._home.owned = True
        view: Any = self.detach()
        view.__dict__.pop("_source", None)  # as in torch, autograd does not see writes to ``data``
        view._by_value = True
        return view  # type: ignore[no-any-return]

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        """Takes over ``values``: an FP8 weight with its home, or dense values, which the next product quantizes."""
        with lock():  # one writer at a time; readers see the home before or after
            new = self.adopt(values)
            self.__dict__.pop("_source", None)
            self.__dict__.pop("_flattened", None)
            torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]  # shape, dtype and device, as in C++
            self._home = new._home

    def adopt(self, values: torch.Tensor) -> FP8Weight:
        """``values`` as this parameter's new value; it keeps its counters and its original parameter."""
        mine = self._home
        if not isinstance(values, torch.Tensor) or values.dim() != self.dim():
            found = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
            raise ValueError(f"the FP8 weight has shape {tuple(self.shape)}, found {found}")
        if isinstance(values, FP8Weight) and values.is_whole():
            new, home = values, values._home
        else:
            dense = values.dequantize() if isinstance(values, FP8Weight) else values.detach()
            if not dense.dtype.is_floating_point or dense.dtype in FP8_DTYPES:
                raise ValueError(f"the FP8 weight takes floating-point values, found {dense.dtype}")
            dense, like = dense.contiguous(), mine.layout.like(dense.shape)
            home = Home(mine.options, like, dense=dense, scheme=mine.scheme, trains=mine.trains)
            home.input_scale = mine.input_scale
            if mine.original is not None and not mine.follows:
                home.keep(nn.Parameter(dense, mine.original.requires_grad))
            new = FP8Weight(home, dense.dtype)
        if home is not mine:
            home.activity, home.owned = mine.activity, True
            if mine.follows and mine.original is not None:
                home.follow(mine.original)
            elif mine.original is not None and home.original is not None and home.original is not mine.original:
                with torch.no_grad():
                    mine.original.data = home.original.data  # so that undo returns the same object
                home.hold_original(mine.original)
            carry_over(new, mine.precision)
        return new

    __tensor_flatten__ = Flatten()
    _stable_hash_for_caching = graph_key

    def fresh(self) -> FP8Weight:
        """Marks a tensor that a cast or a move has just created; see ``Flatten``."""
        if not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack():
            self._fresh = True
        return self

    def _flatten(self) -> tuple[list[str], Any]:
        home = self._home
        remembered: tuple[Any, tuple[list[str], Any]] | None = self.__dict__.get("_flattened")
        if remembered is not None and remembered[0] is home.flat and not home.pending:
            return remembered[1]  # the guards of compiled graphs ask twice per call
        names, context = flatten_home(home, self.dtype)
        flattened = names, (context, self.dtype, self.stride(), self.offset)
        if home.flat is not None:
            self._flattened = (home.flat, flattened)
        return flattened

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> FP8Weight:
        facts, dtype, stride, offset = context
        return FP8Weight(unflatten_home(inner, facts), dtype, outer_size, stride, offset)

    # Set by ``flatten_home``, which every graph calls first. ``attrgetter`` is implemented in C; torch 2.10's Dynamo
    # would trace a Python getter each time its guards run, and it misreads all attributes of a tensor that has
    # __getattr__.
    _inner_data = property(attrgetter("_home.inner_data"))
    _inner_scale = property(attrgetter("_home.inner_scale"))
    _inner_input_scale = property(attrgetter("_home.inner_input_scale"))
    _inner_dense = property(attrgetter("_home.inner_dense"))
    _inner_ids = property(attrgetter("_home.inner_ids"))

    def __deepcopy__(self, memo: dict[int, Any]) -> FP8Weight:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        home = memo.get(id(self._home))  # aliases of one weight stay aliases
        if home is None:
            home = self._home.__deepcopy__(memo)
        twin = self.like(home=home)
        if isinstance(self, nn.Parameter):
            twin = twin.as_parameter()
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        geometry = (tuple(self.size()), self.stride(), self.offset)
        return (weight_from, (self._home, self.dtype, *geometry, isinstance(self, nn.Parameter)))

    def _holder(self) -> ScaledTensor | PackedWeight | None:
        stored = self._home.stored
        return None if stored is None else stored.holder

    def share_memory_(self) -> FP8Weight:
        self._home.settle()
        if (holder := self._holder()) is not None:
            holder.data.share_memory_()  # type: ignore[no-untyped-call]
            holder.scale.share_memory_()  # type: ignore[no-untyped-call]
        return self.like().fresh()

    def is_shared(self) -> bool:
        holder = self._holder()
        return holder is not None and holder.data.is_shared()  # type: ignore[no-untyped-call]

    def data_ptr(self) -> int:
        """The address of the FP8 bytes. It identifies the weight; do not read from it."""
        if (holder := self._holder()) is not None:
            return holder.data.data_ptr() + self.offset
        assert self._home.dense is not None
        return self._home.dense.data_ptr() + self.offset * self._home.dense.element_size()

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes held for it: FP8 data, scales, pending writes and a kept original; for a view, the proportional
        share."""
        whole = self._home.nbytes
        return whole if self.is_whole() else whole * self.numel() // max(1, self._home.layout.stride[0] * self.size(0))

    def __repr__(self) -> str:  # type: ignore[override]
        """As for a dense tensor, with the scheme added; without values on meta or inside a trace."""
        if self.is_meta or not native.plain() or torch.compiler.is_compiling():
            shown = f"shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r}"
        else:
            activity, before = self._home.activity, self._home.activity.dequantizations
            shown = repr(self.dequantize()).removeprefix("tensor(").removesuffix(")")
            activity.dequantizations = before
        return f"FP8Weight({shown}, {self._home.scheme})"

    # Not torch._C._disabled_torch_function_impl: nn.MultiheadAttention and nn.TransformerEncoderLayer check for an
    # override before they choose their fused operation, which would multiply by dense weights.
    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if len(types) > 1 and any(hasattr(kind, "handed_over") for kind in types):
            return NotImplemented  # FP8Entry defines the result
        with torch._C.DisableTorchFunctionSubclass():
            handler = FUNCTIONS.get(func)
            if handler is not None:
                result = handler(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            warn_of_traces()
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = OPERATIONS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return OPERATIONS[None](func, args, kwargs)


never_traced(FP8Weight.__torch_function__, FP8Weight.__torch_dispatch__)


def _parameter_of(values: torch.Tensor, requires_grad: bool) -> Any:
    """``type(parameter)(values, requires_grad=...)``, which libraries use to create a parameter like another."""
    if getattr(values, "_weight", None) is not None:  # an FP8Entry
        values = values.handed_over()  # type: ignore[attr-defined]
    elif values.dtype in FP8_DTYPES and not isinstance(values, FP8Weight):
        raise UnsupportedError(
            f"FP8 bytes are no weight without their scales; dequantize the {values.dtype} tensor first"
        )
    frozen = isinstance(values, FP8Weight)
    return nn.Parameter(values, requires_grad=requires_grad and not frozen)


def weight_from(
    home: Home,
    dtype: torch.dtype,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    is_parameter: bool,
) -> FP8Weight:
    weight = FP8Weight(home, dtype, size, stride, offset)
    return weight.as_parameter() if is_parameter else weight
