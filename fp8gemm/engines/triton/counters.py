# mypy: ignore-errors
# Triton is untyped, and not installed everywhere.
"""Counters of products that are split along K: int32 zeros, one for each tile, which the tile's last program resets.

They are slices of a slab, which is allocated once per device and never freed. So products inside a CUDA graph allocate
nothing and zero nothing, and nothing of ours stays in the memory pool of a graph, which ``torch.compile`` with
``mode="reduce-overhead"`` forbids. In eager mode each stream has a slice of its own, as its products run one after
another. Each product that a graph captures has its own: graphs run on any stream, beside each other.
"""

from __future__ import annotations

import threading

import torch
from triton.runtime import driver

from .table import MOST_SPLIT_TILES

SLAB = 1 << 20  # counters, 4 MiB: a graph of 225 products of 128 tiles each takes 3 % of it
ALIGNMENT = 32  # counters, 128 bytes: a cache line
RESERVE = SLAB // 2  # what is left for captures, which cannot allocate another slab


class Slab:
    """Zeros on one device, handed out in slices."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.used = device, 0
        # In a thread, so that it is not allocated in a memory pool that torch has opened for this one.
        thread = threading.Thread(target=self._allocate)
        thread.start()
        thread.join()

    def _allocate(self) -> None:
        self.memory = torch.zeros(SLAB, dtype=torch.int32, device=self.device)
        torch.cuda.synchronize(self.device)

    def take(self, count: int) -> torch.Tensor | None:
        """The next ``count`` zeros, aligned, as kernels are specialized for that; None if there are fewer."""
        start = self.used + -self.used % ALIGNMENT
        if start + count > SLAB:
            return None
        self.used = start + count
        return self.memory[start : self.used]


_lock = threading.Lock()
_slabs: dict[int, list[Slab]] = {}  # by device; the last one has zeros left
_streams: dict[tuple[int, int], torch.Tensor] = {}  # slices of eager products, by device and stream


def reserve(device: torch.device) -> None:
    """Makes sure that captures on this device find counters; called where allocating is possible."""
    if device.type != "cuda":
        return
    with _lock:
        slabs = _slabs.setdefault(device.index, [])
        if not slabs or slabs[-1].used > SLAB - RESERVE:
            slabs.append(Slab(device))


def counters(count: int, device: torch.device) -> torch.Tensor:
    """``count`` int32 zeros (at most ``MOST_SPLIT_TILES``) that no other running product uses."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _captured(count, device)
    key = (device.index, driver.active.get_current_stream(device.index))
    own = _streams.get(key)
    if own is None:
        reserve(device)
        with _lock:
            own = _streams.setdefault(key, _slabs[device.index][-1].take(MOST_SPLIT_TILES))
    return own


def _captured(count: int, device: torch.device) -> torch.Tensor:
    with _lock:
        slabs = _slabs.get(device.index)
        own = slabs[-1].take(count) if slabs else None
    if own is None:  # zeroed by a node of the graph, which keeps their memory
        own = torch.zeros(count, dtype=torch.int32, device=device)
    return own
