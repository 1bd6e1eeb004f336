"""The quickstart's own measurements: bytes of everything that a model holds, and a verdict if FP8 is slower."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fp8gemm import FP8GemmOptions, enable_fp8_gemm


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "quickstart", Path(__file__).parent.parent / "examples" / "quickstart.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_storage_counts_once(quickstart: ModuleType) -> None:
    n, k = 96, 64
    dense = nn.Linear(k, n, dtype=torch.bfloat16)
    dense.register_buffer("view", dense.weight.detach()[:3])
    dense.hidden = [{"deep": torch.zeros(5, dtype=torch.float32)}]
    assert quickstart.storage_bytes(dense) == 2 * n * k + 2 * n + 20
    for storage, kept in (("keep", 2 * n * k), ("cpu_offload", 2 * n * k), ("discard", 0)):
        layer = nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
        enable_fp8_gemm(layer, options=FP8GemmOptions(fp16_weight_storage=storage))
        extra = sum(
            tensor.nbytes for tensor in layer.home.stored.packed.extra.values()
        )  # an engine's tensors, where there is no compiler
        assert quickstart.storage_bytes(layer) == n * k + 4 * n + kept + extra, storage


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (10.0, 15.0, "FP8 is slower here: a batch takes 1.50 times"),
        (10.0, 5.0, "FP8 is faster here: 2.00"),
        (10.0, 10.4, "as fast"),
    ],
)
def test_the_verdict_says_so_in_words(quickstart: ModuleType, before: float, after: float, words: str) -> None:
    assert words in quickstart.verdict(before, after)
