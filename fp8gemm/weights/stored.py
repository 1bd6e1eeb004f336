"""The bytes of a quantized weight, and the forms that engines made of them."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from ..engines import PackedWeight, restore
from ..scaled import ScaledTensor

_lock = threading.RLock()


def lock() -> threading.RLock:
    """Of quantizing, packing, writing and settling, which are rare; one for all weights."""
    return _lock


def _acquire() -> None:
    _lock.acquire()


def _release() -> None:
    _lock.release()


def _renew() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # A process is forked between changes, so that no weight is half written in the child, where nobody would end it.
    os.register_at_fork(before=_acquire, after_in_parent=_release, after_in_child=_renew)


class Stored:
    """A quantized weight at one moment. Its bytes are never written to: a change makes another, published at once.

    Copies of a weight share it until they are written to. Either ``plain`` bytes ``[..., N, K]`` are there, or the form
    that an engine ``packed`` them into, from which they can be restored; both where they share memory.
    """

    __slots__ = ("forms", "packed", "plain")

    def __init__(self, plain: ScaledTensor | None, packed: PackedWeight | None = None) -> None:
        self.plain, self.packed = plain, packed
        self.forms: dict[Any, PackedWeight] = {}  # of parts, other devices and other dtypes

    @property
    def device(self) -> torch.device:
        holder = self.plain or self.packed
        assert holder is not None
        return holder.device

    def scaled(self) -> ScaledTensor:
        """The plain bytes and float32 scales, bit for bit; new memory where an engine packed them."""
        if (plain := self.plain) is not None:
            return plain
        assert self.packed is not None
        return restore(self.packed)

    def forget_calls(self) -> None:
        """Lets go of calls that were decided for these bytes, which may hold them: see ``remembered_linear``."""
        for holder in (self.plain, self.packed):
            if holder is not None:
                holder.data.__dict__.pop("_fp8gemm_calls", None)

    def hold(self, packed: PackedWeight) -> None:
        """Takes the form that products use; plain bytes that it does not share memory with are let go."""
        plain = self.plain
        shares = plain is not None and _same_memory(plain.data, packed.data)
        self.packed = packed
        if not shares:
            self.plain = None


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    if type(a) is not torch.Tensor or a.is_meta:
        return False
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape
