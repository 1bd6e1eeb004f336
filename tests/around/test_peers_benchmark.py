"""The libraries with which benchmarks/linear.py compares multiply by the weight that benchmarks/peers.py says.

Not part of the ordinary run: ``pip install --no-deps sdnq optimum-quanto torchao``, then ``pytest tests/around``. A
library that is not installed is skipped.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fp8gemm.bench.contest import errors

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
try:
    peers = importlib.import_module("peers")
finally:
    sys.path.pop(0)

LIBRARIES = {"torchao int8": "torchao", "torchao fp8": "torchao", "quanto fp8": "optimum.quanto", "sdnq fp8": "sdnq"}

pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_each_multiplies_by_its_own_weight(name: str, dtype: torch.dtype) -> None:
    """Products of each copy; its weight is FP8 or int8, and so within 3.5 % of the dense one but not equal."""
    pytest.importorskip(LIBRARIES[name])
    copies = [torch.randn(256, 384).to(dtype) for _ in range(2)]
    peer = peers.make(name, copies)
    assert peer.weight.dtype == torch.float32
    assert 1e-3 < errors(peer.weight, copies[0].float())[0] < 0.035
    x = torch.randn(40, 384).to(dtype)
    for layer, w in zip(peer.layers, copies, strict=True):
        assert errors(layer(x), x.float() @ w.float().t())[0] < 0.035
    assert errors(peer.layers[0](x), x.float() @ peer.weight.t())[0] < (1e-5 if dtype == torch.float32 else 4e-3)
