"""A prompt of any length runs kernels that ``warmup`` has compiled."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from fp8gemm import SCHEMES
from fp8gemm.models.warmup import TOKENS

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

from compilation import recorded, variant
from elsewhere import engine_on, grouped, linear

from fp8gemm.engines.triton.plan import place

# RTX 4090, RTX 5090, H100: the number of multiprocessors bounds the grid of a persistent kernel.
CARDS = {(8, 9): 128, (12, 0): 170, (9, 0): 132}
PROMPTS = range(65, 1025)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("scheme", ["row", "block"])
@pytest.mark.parametrize("capability", CARDS, ids=lambda value: "sm{}{}".format(*value))
def test_every_prompt_is_warm(
    capability: tuple[int, int], scheme: str, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = place(capability, multiprocessors=CARDS[capability])
    engine = engine_on(where if library else replace(where, library=frozenset()))

    def met(tokens: Iterable[int], n: int, k: int) -> set[tuple[str, ...]]:
        call = lambda: [linear(engine, SCHEMES[scheme], n, k, m, torch.bfloat16, bias=False) for m in tokens]  # noqa: E731
        return {variant(launch, capability) for launch in recorded(call, monkeypatch)}

    for n, k in ((4096, 4096), (1024, 4096), (4096, 14336), (512, 500)):
        prompts = met(PROMPTS, n, k)
        assert prompts, "a product launched nothing"
        assert prompts <= met(TOKENS, n, k), (n, k)


@pytest.mark.parametrize("scheme", ["row", "block"])
@pytest.mark.parametrize("capability", CARDS, ids=lambda value: "sm{}{}".format(*value))
def test_every_number_of_routed_tokens_is_warm(
    capability: tuple[int, int], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(place(capability, multiprocessors=CARDS[capability]))

    def met(tokens: Iterable[int]) -> set[tuple[str, ...]]:
        call = lambda: [grouped(engine, SCHEMES[scheme], 8, 1024, 2048, m) for m in tokens]  # noqa: E731
        return {variant(launch, capability) for launch in recorded(call, monkeypatch)}

    prompts = met(PROMPTS)
    assert prompts
    assert prompts <= met(TOKENS)
