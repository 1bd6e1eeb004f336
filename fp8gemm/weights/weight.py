"""The lazy weight that ``FP8Linear.weight`` hands out: looks like the dense weight, multiplies on FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


class WeightSource(Protocol):
    """Who owns the FP8 weight behind a lazy one."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., K] @ w.T + bias`` on the FP8 engine."""

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[N, K]`` dequantized; counted in the report."""

    def writable_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight ``[N, K]`` that an in-place operation may write to, before ``replace_weight`` takes it."""

    def replace_weight(self, w: torch.Tensor) -> None:
        """Takes a new dense weight ``[N, K]``."""


class LazyTensor(torch.Tensor):
    """What has a shape, dtype and device but no memory; a copy of it, or a pickle, is dense."""

    def dequantize(self) -> torch.Tensor:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        dense: torch.Tensor = memo.setdefault(id(self), self.dequantize())
        return dense

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class FP8Weight(LazyTensor):
    """A weight ``[N, K]`` (or its transpose) that answers shape, dtype and device without having any memory.

    ``F.linear``, ``@``, ``mm`` and ``addmm`` with it run the FP8 engine. Everything else dequantizes, correctly, and
    is counted; what writes to it is written back and quantized again.
    """

    source: WeightSource
    transposed: bool

    @staticmethod
    def __new__(
        cls, source: WeightSource, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, transposed: bool
    ) -> FP8Weight:
        n, k = shape
        size, stride = ((k, n), (1, k)) if transposed else ((n, k), (k, 1))
        weight: FP8Weight = torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, dtype=dtype, device=device, requires_grad=False
        )
        weight.source = source
        weight.transposed = transposed
        return weight

    def like(self, *, transposed: bool | None = None, dtype: torch.dtype | None = None) -> FP8Weight:
        """The same weight, transposed or said to be of another dtype: costs nothing."""
        shape = (self.shape[1], self.shape[0]) if self.transposed else (self.shape[0], self.shape[1])
        turned = self.transposed if transposed is None else transposed
        return FP8Weight(self.source, shape, dtype or self.dtype, self.device, turned)

    def dequantize(self) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            w = self.source.dense_weight(self.dtype)
            return w.t() if self.transposed else w

    def writable(self) -> torch.Tensor:
        w = self.source.writable_weight(self.dtype)
        return w.t() if self.transposed else w

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FP8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            product = _linear(*args, **kwargs)
            if product is not None:
                return product
        # Composite functions such as multi_head_attention_forward come apart below, in __torch_dispatch__.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not None:
                return result
        return _dequantized_call(func, args, kwargs)


def _dequantized_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an op on dense weights; what the op writes to is handed back to its owner."""
    written = [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if isinstance(value, FP8Weight) and argument.alias_info is not None and argument.alias_info.is_write
    ]
    dense: dict[int, tuple[FP8Weight, torch.Tensor]] = {}

    def densify(weight: FP8Weight) -> torch.Tensor:
        if id(weight) not in dense:
            writes = any(weight is value for value in written)
            dense[id(weight)] = (weight, weight.writable() if writes else weight.dequantize())
        return dense[id(weight)][1]

    result = func(*tree_map_only(FP8Weight, densify, args), **tree_map_only(FP8Weight, densify, kwargs))
    for weight in written:
        w = dense[id(weight)][1]
        weight.source.replace_weight(w.t() if weight.transposed else w)
        if result is w:
            result = weight
    return result


def _linear(input: Any, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    if isinstance(weight, FP8Weight) and not weight.transposed and not isinstance(input, FP8Weight):
        return weight.source.product(input, bias)
    return None


def _transpose(weight: FP8Weight, *dims: int) -> FP8Weight | None:
    swaps = not dims or {dim % 2 for dim in dims} == {0, 1}
    return weight.like(transposed=not weight.transposed) if swaps else None


def _permute(weight: FP8Weight, dims: list[int]) -> FP8Weight:
    return weight if [dim % 2 for dim in dims] == [0, 1] else weight.like(transposed=not weight.transposed)


def same(lazy: Any) -> Any:
    """A lazy weight or stack again, as ``detach`` gives it."""
    return lazy.like()


def to_copy(lazy: Any, *, dtype: torch.dtype | None = None, **others: Any) -> Any:
    """A cast to another floating dtype is free; a copy to elsewhere is not ours to fake, and gives None."""
    moved = others.get("device") not in (None, lazy.device)
    if moved or dtype is None or not dtype.is_floating_point:
        return None
    return lazy.like(dtype=dtype)


def _mm(a: Any, b: Any) -> torch.Tensor | None:
    if isinstance(b, FP8Weight) and b.transposed and not isinstance(a, FP8Weight):
        return b.source.product(a, None)
    if isinstance(a, FP8Weight) and not a.transposed and not isinstance(b, FP8Weight):
        return a.source.product(b.t(), None).t()
    return None


def _mv(weight: Any, x: torch.Tensor) -> torch.Tensor | None:
    if isinstance(weight, FP8Weight) and not weight.transposed:
        return weight.source.product(x, None)
    return None


def _addmm(bias: torch.Tensor, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> torch.Tensor | None:
    if beta == 1 and alpha == 1 and isinstance(b, FP8Weight) and b.transposed and not isinstance(a, FP8Weight):
        if bias.dim() == 1 and bias.shape[0] == b.shape[1]:
            return b.source.product(a, bias)
        return b.source.product(a, None) + bias
    return None


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.detach.default: same,
    aten.alias.default: same,
    aten.lift_fresh.default: same,
    aten._to_copy.default: to_copy,
    aten.linear.default: _linear,
    aten.mm.default: _mm,
    aten.mv.default: _mv,
    aten.addmm.default: _addmm,
}
