"""A dense parameter that is assigned to a converted layer is shared by it, as a dense layer would share it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from fp8gemm import FP8GemmOptions, disable_fp8_gemm, enable_fp8_gemm


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(32, 64)
        self.head = nn.Linear(64, 32, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


IDS = torch.arange(8)


def tied(storage: str = "discard") -> Model:
    model = enable_fp8_gemm(Model(), options=FP8GemmOptions(fp16_weight_storage=storage))
    model(IDS)
    model.head.weight = model.table.weight
    return model


def is_like_dense(model: Model) -> bool:
    expected = model.table(IDS) @ model.table.weight.T
    return bool((model(IDS) - expected).norm() < 0.05 * expected.norm())


@pytest.mark.parametrize("storage", ["discard", "keep"])
@torch.no_grad()
def test_writes_to_either_reach_the_other(storage: str) -> None:
    model = tied(storage)
    assert is_like_dense(model)
    for _ in range(3):  # the third call of a shape is bound
        model(IDS)
    model.table.weight.mul_(2)
    assert is_like_dense(model)
    model.head.weight.mul_(-1)
    model(IDS)
    assert is_like_dense(model)
    disable_fp8_gemm(model)
    assert model.head.weight is model.table.weight


@torch.no_grad()
def test_copies_and_moves() -> None:
    model = tied()
    for twin in (copy.deepcopy(model), tied().to(torch.bfloat16), tied().double()):
        assert is_like_dense(twin)
        twin.table.weight.mul_(2)
        assert is_like_dense(twin)
    assert is_like_dense(pickle.loads(pickle.dumps(model)))
    model.head.weight.clone().zero_()
    copy.deepcopy(model.head).weight.zero_()
    assert is_like_dense(model)
    assert model.table.weight.count_nonzero()


@torch.no_grad()
def test_what_nobody_else_holds_is_let_go() -> None:
    model = enable_fp8_gemm(Model())
    model(IDS)
    values = nn.Parameter(torch.randn(32, 64))
    expected = model.table(IDS) @ values.T
    gone = weakref.ref(values)
    model.head.weight = values
    del values
    gc.collect()
    assert gone() is None
    assert (model(IDS) - expected).norm() < 0.05 * expected.norm()
    assert model.head.weight._home.dense is None
