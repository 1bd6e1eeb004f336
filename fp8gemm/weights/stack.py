"""The lazy stack that an owner of FP8 experts reads: ``[E, N, K]`` or ``[E, K, N]``, whole or some experts of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from .einsum import batched_operands
from .weight import FP8Weight, LazyTensor, same, to_copy

aten = torch.ops.aten


class StackSource(Protocol):
    """Who owns the FP8 experts behind a lazy stack."""

    def expert_product(self, expert: int, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...

    def grouped_product(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor: ...

    def selected_product(self, x: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor: ...

    def dense_stack(self, dtype: torch.dtype, ids: torch.Tensor | None = None) -> torch.Tensor: ...

    def expert_weight(self, expert: int, dtype: torch.dtype) -> torch.Tensor: ...


class ExpertSource:
    """One expert of a stack, as the owner of an ``FP8Weight``."""

    def __init__(self, stack: StackSource, expert: int) -> None:
        self.stack, self.expert = stack, expert

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.stack.expert_product(self.expert, x, bias)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        return self.stack.expert_weight(self.expert, dtype)

    def writable_weight(self, dtype: torch.dtype) -> torch.Tensor:
        raise RuntimeError(
            f"expert {self.expert} of an FP8 stack cannot be written to in place; disable_fp8_gemm(model) first"
        )

    def replace_weight(self, w: torch.Tensor) -> None:
        self.writable_weight(w.dtype)


class FP8Stack(LazyTensor):
    """Experts' weights that answer shape, dtype and device without having any memory.

    Indexing with a number gives that expert's ``FP8Weight``; ``bmm``, ``_grouped_mm`` and ``einsum`` run the FP8
    engine. Everything else dequantizes, correctly, and is counted. Writing to it is refused.
    """

    source: StackSource
    transposed: bool
    ids: torch.Tensor | None

    @staticmethod
    def __new__(
        cls,
        source: StackSource,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        transposed: bool,
        ids: torch.Tensor | None = None,
    ) -> FP8Stack:
        experts, n, k = shape
        count = experts if ids is None else ids.shape[0]
        size, stride = ((count, k, n), (n * k, 1, k)) if transposed else ((count, n, k), (n * k, k, 1))
        stack: FP8Stack = torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, dtype=dtype, device=device, requires_grad=False
        )
        stack.source, stack.transposed, stack.ids = source, transposed, ids
        return stack

    def like(
        self, *, transposed: bool | None = None, dtype: torch.dtype | None = None, ids: torch.Tensor | None = None
    ) -> FP8Stack:
        """The same experts transposed or said to be of another dtype, or some of them: costs nothing."""
        count, a, b = self.shape
        n, k = (b, a) if self.transposed else (a, b)
        turned = self.transposed if transposed is None else transposed
        chosen = self.ids if ids is None else ids
        return FP8Stack(self.source, (count, n, k), dtype or self.dtype, self.device, turned, chosen)

    def dequantize(self) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            w = self.source.dense_stack(self.dtype, self.ids)
            return w.transpose(1, 2) if self.transposed else w

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FP8Stack(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.einsum:
            product = _einsum(*args)
            if product is not None:
                return product
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
        if func._schema.is_mutable and any(isinstance(arg, FP8Stack) for arg in args[:1]):
            raise RuntimeError(f"{func} writes to an FP8 stack of experts; disable_fp8_gemm(model) first")
        dense = tree_map_only(FP8Stack, FP8Stack.dequantize, (args, kwargs))
        args, kwargs = tree_map_only(FP8Weight, FP8Weight.dequantize, dense)
        return func(*args, **kwargs)


def _select(stack: FP8Stack, dim: int, index: int) -> FP8Weight | None:
    if dim % 3 != 0:
        return None
    count, a, b = stack.shape
    expert = index % count if -count <= index < count else count  # out of range: let torch say so
    if expert == count:
        raise IndexError(f"index {index} is out of bounds for a stack of {count} experts")
    if stack.ids is not None:
        expert = int(stack.ids[expert])
    shape = (b, a) if stack.transposed else (a, b)
    return FP8Weight(ExpertSource(stack.source, expert), shape, stack.dtype, stack.device, stack.transposed)


def _index(stack: FP8Stack, indices: list[torch.Tensor | None]) -> FP8Stack | None:
    ids = indices[0]
    if len(indices) != 1 or ids is None or ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        return None
    return stack.like(ids=ids if stack.ids is None else stack.ids[ids])


def _index_select(stack: FP8Stack, dim: int, ids: torch.Tensor) -> FP8Stack | None:
    return _index(stack, [ids]) if dim % 3 == 0 else None


def _unbind(stack: FP8Stack, dim: int = 0) -> list[FP8Weight | None] | None:
    return [_select(stack, 0, index) for index in range(stack.shape[0])] if dim % 3 == 0 else None


def _transpose(stack: FP8Stack, a: int, b: int) -> FP8Stack | None:
    return stack.like(transposed=not stack.transposed) if {a % 3, b % 3} == {1, 2} else None


def _permute(stack: FP8Stack, dims: list[int]) -> FP8Stack | None:
    order = [dim % 3 for dim in dims]
    if order == [0, 1, 2]:
        return stack.like()
    return stack.like(transposed=not stack.transposed) if order == [0, 2, 1] else None


def _bmm(a: Any, b: Any) -> torch.Tensor | None:
    if isinstance(b, FP8Stack) and b.transposed and not isinstance(a, FP8Stack):
        return b.source.selected_product(a, b.ids)
    if isinstance(a, FP8Stack) and not a.transposed and not isinstance(b, FP8Stack):
        return a.source.selected_product(b.transpose(1, 2), a.ids).transpose(1, 2)
    return None


def _grouped_mm(
    a: Any,
    b: Any,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor | None:
    if not isinstance(b, FP8Stack) or isinstance(a, FP8Stack) or not b.transposed or b.ids is not None:
        return None
    if a.dim() != 2 or offs is None or bias is not None or out_dtype not in (None, a.dtype):
        return None
    return b.source.grouped_product(a, offs)


def _einsum(equation: Any, *operands: Any) -> torch.Tensor | None:
    """``einsum("ebk,enk->ebn", x, stack)`` and its likes: the expert letter in x and y, one letter contracted."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    stacks = [position for position, operand in enumerate(operands) if isinstance(operand, FP8Stack)]
    if not isinstance(equation, str) or len(operands) != 2 or len(stacks) != 1:
        return None
    stack, x = operands[stacks[0]], operands[1 - stacks[0]]
    plan = batched_operands(equation, stacks[0], stack_is_transposed=stack.transposed)
    if plan is None or stack.ids is not None:
        return None
    return plan.output(stack.source.selected_product(plan.input(x, experts=stack.shape[0]), None))


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.select.int: _select,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.unbind.int: _unbind,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.detach.default: same,
    aten.alias.default: same,
    aten.lift_fresh.default: same,
    aten._to_copy.default: to_copy,
    aten.bmm.default: _bmm,
    aten._grouped_mm.default: _grouped_mm,
}
