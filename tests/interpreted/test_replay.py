"""Replaying a recorded product on other tokens gives the same bits as running it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from stage import Held, OnCard, packed
from test_products import BLOCK, BLOCKS, ROW_ROW, ROWS, TOKENS, VECTORS

from fp8gemm import ROW, Scheme, quantize
from fp8gemm.engines.triton import launch, replay
from fp8gemm.engines.triton.plan import Plan

BF16 = torch.bfloat16


class Compiled:
    """Replaces a compiled kernel: takes addresses, as that does, and interprets the kernel on their memory."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.given = kernel, ()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, stream: int | None = None) -> None:
            if any(isinstance(arg, torch.Tensor) for arg in args):
                self.given = args
            self.kernel[grid](*(_tensor_at(arg, like) for arg, like in zip(args, self.given, strict=True)))

        return run


class Cache(dict[Any, Any]):
    """Makes every kernel appear compiled."""

    def get(self, key: Any, default: Any = None) -> Compiled:
        return self.setdefault(key, Compiled(key[0]))


def _tensor_at(arg: Any, like: Any) -> Any:
    if not isinstance(like, torch.Tensor) or isinstance(arg, torch.Tensor):
        return arg
    memory = (ctypes.c_char * like.untyped_storage().nbytes()).from_address(arg - like.storage_offset() * like.itemsize)
    plain = torch.frombuffer(memory, dtype=torch.uint8).view(like.dtype)
    return torch.as_strided(plain, like.shape, like.stride(), like.storage_offset())


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_compiled", Cache())


CASES = {
    "vectors": (VECTORS, "nothing", ROW_ROW, 1),
    "vectors, split": (replace(VECTORS, splits=2), "nothing", ROW_ROW, 3),
    "tokens": (TOKENS, "nothing", ROW_ROW, 5),
    "tokens, split": (replace(TOKENS, splits=4), "nothing", ROW_ROW, 5),
    "rows": (ROWS, "rows", ROW_ROW, 70),
    "rows, TMA": (replace(ROWS, tma=True), "rows", ROW_ROW, 70),
    "rows, static": (ROWS, "rows", Scheme(weight=ROW, activation=ROW, static=True), 70),
    "blocks, inline": (replace(BLOCKS, splits=2), "groups", BLOCK, 5),
    "blocks": (BLOCKS, "groups", BLOCK, 70),
    "library": (Plan(path="library"), "rows", ROW_ROW, 70),
    "dense": (Plan(path="dense"), "nothing", ROW_ROW, 70),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("with_bias", [True, False])
def test_replayed_products(case: str, with_bias: bool) -> None:
    plan, rounds_to, scheme, m = CASES[case]
    engine = Held(plan, rounds_to=rounds_to)
    n, k = 48 if plan.path == "library" else 72, 256
    weight = packed(quantize(torch.randn(n, k), scheme.weight), scheme)
    if scheme.static:
        weight = replace(weight, input_scale=torch.tensor(0.01))
    bias = torch.randn(n, dtype=BF16) if with_bias else None
    first = torch.randn(1, m, k, dtype=BF16)
    bound = engine.bind(first, weight, bias, BF16)
    assert bound is not None
    kept = []
    for _ in range(3):
        x = torch.randn(1, m, k, dtype=BF16)
        expected = engine.linear(x.view(m, k), weight, bias, BF16)
        y = bound(x)
        assert y.shape == (1, m, n)
        assert y.view(m, n).equal(expected)
        kept.append((y, expected))
    assert all(y.view(m, n).equal(expected) for y, expected in kept), "a later call wrote into an earlier result"


def test_memory_that_nobody_named_is_not_recorded() -> None:
    """Otherwise a replay would read a tensor that was freed."""
    weight = packed(quantize(torch.randn(32, 64), ROW), ROW_ROW)
    engine = OnCard()
    x = torch.randn(8, 64, dtype=BF16)
    product = lambda tokens: engine.linear(tokens, weight, None, BF16)  # noqa: E731
    assert replay.record(product, x, (weight.data, weight.scale), (8, 32)) is not None
    assert replay.record(product, x, (weight.data,), (8, 32)) is None
    assert replay.record(lambda tokens: product(tokens.clone()), x, (weight.data, weight.scale), (8, 32)) is None
    assert replay.record(lambda tokens: product(tokens) + 1, x, (weight.data, weight.scale), (8, 32)) is None
    assert replay.recording() is None


def test_an_uncompiled_kernel_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_compiled", {})
    weight = packed(quantize(torch.randn(32, 64), ROW), ROW_ROW)
    assert OnCard().bind(torch.randn(8, 64, dtype=BF16), weight, None, BF16) is None
