"""The bytes of a quantized weight, and the forms that engines packed from them."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from ..engines import PackedWeight, restore
from ..scaled import ScaledTensor
from .remembered import forget_bound

_lock = threading.RLock()


def lock() -> threading.RLock:
    """The lock of all weights for quantizing, packing and writing, which are rare."""
    return _lock


def _acquire() -> None:
    _lock.acquire()


def _release() -> None:
    _lock.release()


def _renew() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # Fork only while no change is in progress: in the child, no thread would complete it.
    os.register_at_fork(before=_acquire, after_in_parent=_release, after_in_child=_renew)


class Stored:
    """A quantized weight at one moment. Its bytes are never written to: a change publishes a new object.

    Copies of a weight share it until one is written to. It holds ``plain`` bytes ``[..., N, K]``, or the weight that an
    engine has ``packed`` and from which they can be restored, or both if they share memory.
    """

    __slots__ = ("forms", "packed", "plain")

    def __init__(self, plain: ScaledTensor | None, packed: PackedWeight | None = None) -> None:
        self.plain, self.packed = plain, packed
        self.forms: dict[Any, PackedWeight] = {}  # packed weights of parts, for other devices and for other dtypes

    @property
    def holder(self) -> ScaledTensor | PackedWeight:
        """Whatever holds the bytes."""
        holder = self.plain or self.packed
        assert holder is not None
        return holder

    @property
    def device(self) -> torch.device:
        return self.holder.device

    def scaled(self) -> ScaledTensor:
        """The plain bytes and float32 scales, bit for bit; in new memory if only the packed weight is held."""
        if (plain := self.plain) is not None:
            return plain
        assert self.packed is not None
        return restore(self.packed)

    def nbytes_beside(self, other: Stored | None) -> int:
        """The FP8 bytes that are held in addition to those of ``other``."""
        shares = other is not None and self.holder.data.data_ptr() == other.holder.data.data_ptr()
        return 0 if shares else self.holder.data.nbytes

    def forget_calls(self) -> None:
        """Drops calls that were bound for these bytes and may hold them; see ``remembered_linear``."""
        for holder in (self.plain, self.packed):
            if holder is not None:
                forget_bound(holder.data)

    def hold(self, packed: PackedWeight) -> None:
        """Keeps the packed weight that products use; plain bytes are dropped unless the two share memory."""
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
