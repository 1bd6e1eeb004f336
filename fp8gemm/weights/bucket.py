"""Flat buckets of tensors, as DistributedDataParallel broadcasts them; FP8 weights in them are sent as bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .collectives import finishing
from .copies import watched_by_a_mode
from .dispatch import OPERATIONS, implements
from .message import Message, values_to_send
from .splits import joined
from .weight import FP8Weight

aten = torch.ops.aten


class Bucket(torch.Tensor):
    """The result of ``torch.cat`` on flat tensors, kept apart so that the slice of one tensor's range returns it.

    A broadcast sends them one by one. All other operations get dense values.
    """

    parts: list[torch.Tensor]

    @staticmethod
    def __new__(cls, parts: list[torch.Tensor]) -> Bucket:
        total, first = sum(part.numel() for part in parts), parts[0]
        bucket = torch.Tensor._make_wrapper_subclass(cls, (total,), dtype=first.dtype, device=first.device)
        bucket.parts = parts
        torch._C._set_throw_on_mutable_data_ptr(bucket)
        return bucket

    def values(self) -> torch.Tensor:
        return torch.cat([part.dequantize() if isinstance(part, FP8Weight) else part for part in self.parts])

    def write(self, values: torch.Tensor) -> None:
        start = 0
        for part in self.parts:
            part.copy_(values[start : start + part.numel()])
            start += part.numel()

    def part_at(self, start: int, end: int) -> torch.Tensor | None:
        for part in self.parts:
            if start == 0 and end == part.numel():
                return part.detach()
            start, end = start - part.numel(), end - part.numel()
        return None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.c10d.broadcast_.default:
            return _broadcast(func, *args, **kwargs)
        if func is aten.slice.Tensor and not kwargs and len(args) == 4:
            bucket, _, start, end = args
            part = bucket.part_at(start, min(end, bucket.numel()))
            if part is not None:
                return part
        dense: list[tuple[Bucket, torch.Tensor]] = []

        def values(bucket: Bucket) -> torch.Tensor:
            dense.append((bucket, bucket.values()))
            return dense[-1][1]

        args, kwargs = tree_map_only(Bucket, values, (args, kwargs))
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            for bucket, value in dense:
                bucket.write(value)
        back = {id(value): bucket for bucket, value in dense}
        return tree_map_only(torch.Tensor, lambda t: back.get(id(t), t), result)


def _broadcast(func: Any, tensors: list[Bucket], *args: Any, **kwargs: Any) -> Any:
    works = [func([part], *args, **kwargs)[1] for part in tensors[0].parts]
    waits: list[Callable[[], Any]] = [torch.distributed.Work.unbox(work).wait for work in works]
    return tensors, finishing(works[-1], lambda: [wait() for wait in waits])


@implements(OPERATIONS, aten.cat.default)
def _cat(tensors: Any, dim: int = 0) -> Any:
    """Concatenates into a bucket, or parts of one weight into a weight, if torch.distributed is initialized."""
    if not torch.distributed.is_initialized() or torch.compiler.is_compiling() or watched_by_a_mode():
        return NotImplemented
    if (weight := joined(tensors, dim)) is not None:
        return weight
    alike = len({(t.dtype, t.device) for t in tensors}) == 1 and all(t.dim() == 1 for t in tensors)
    if not alike:
        return NotImplemented
    parts = [_snapshot(tensor) for tensor in tensors]
    return Bucket(parts) if any(isinstance(part, FP8Weight) for part in parts) else torch.cat(parts)


def _snapshot(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; that of a weight which can be sent as bytes shares them until either is written to."""
    if not isinstance(tensor, FP8Weight):
        return tensor.clone()
    message = Message.of(tensor)
    if message is None or not message.ready or not message.part.whole(tensor._home.layout):
        return values_to_send(tensor)
    return tensor.like(home=tensor._home.copy())
