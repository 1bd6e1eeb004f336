"""The counters of split products, on a stand-in for a GPU that counts allocations."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace

import pytest
import torch

from fp8gemm.engines.triton import counters

CARD = torch.device("cuda", 0)


class Gpu:
    """What ``counters`` asks torch and Triton's driver."""

    int32 = torch.int32

    def __init__(self) -> None:
        self.stream, self.capturing = 1, False
        self.made: list[tuple[int, bool]] = []  # (elements, whether in the thread of the products)
        self.thread = threading.get_ident()
        self.cuda = SimpleNamespace(
            is_current_stream_capturing=lambda: self.capturing and threading.get_ident() == self.thread,
            synchronize=lambda device: None,
        )
        self.active = SimpleNamespace(get_current_stream=lambda index: self.stream)

    def zeros(self, count: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.made.append((count, threading.get_ident() == self.thread))
        return torch.zeros(count, dtype=dtype)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(counters, "torch", gpu)
    monkeypatch.setattr(counters, "driver", gpu)
    monkeypatch.setattr(counters, "_slabs", {})
    monkeypatch.setattr(counters, "_streams", {})
    return gpu


def take(count: int = 100) -> tuple[int, int]:
    """The first and one past the last address of counters."""
    taken = counters.counters(count, CARD)
    assert not taken.any()
    return taken.data_ptr(), taken.data_ptr() + 4 * taken.numel()


def test_each_stream_and_each_captured_product_has_its_own(gpu: Gpu) -> None:
    counters.reserve(CARD)
    first, again = take(), take()
    gpu.stream = 2
    other = take()
    gpu.capturing = True
    captured = [take() for _ in range(10)]
    assert first == again
    ranges = sorted([first, other, *captured])
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges)), "shared counters"


def test_nothing_is_allocated_where_a_pool_may_be_open(gpu: Gpu) -> None:
    """Neither in a capture nor in the thread that runs products, in which torch.compile warms up graphs."""
    counters.reserve(CARD)
    take()
    gpu.stream = 2
    take()
    gpu.capturing = True
    for _ in range(1000):
        take()
    assert gpu.made == [(counters.SLAB, False)]


def test_a_slab_that_is_half_used_is_followed_by_another(gpu: Gpu) -> None:
    counters.reserve(CARD)
    gpu.capturing = True
    for _ in range(counters.SLAB // 1024):
        take(1024)
    take(1024)  # none are left: this one is made, and zeroed, inside the graph
    assert gpu.made == [(counters.SLAB, False), (1024, True)]
    gpu.capturing = False
    counters.reserve(CARD)
    assert gpu.made[2:] == [(counters.SLAB, False)]
    gpu.capturing = True
    take(1024)
    assert len(gpu.made) == 3
