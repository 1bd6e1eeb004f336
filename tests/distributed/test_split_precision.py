"""The precision of weights that are split: that which was set before, and no originals."""

from __future__ import annotations

import pytest
import torch
from ranks import Case, Cases, Rank
from small import dense_mlp, mesh, tokens
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, set_precision

cases = Cases("precision")


def made(rank: Rank, storage: str = "discard") -> nn.Module:
    """A model whose engine quantizes activations."""
    options = FP8GemmOptions(scheme="tensor", engine="reference", fp16_weight_storage=storage)
    return enable_fp8_gemm(dense_mlp(rank, 96), options=options)


def expected(rank: Rank) -> torch.Tensor:
    fp8, weight_only = made(rank), made(rank)
    set_precision(weight_only, "*", "weight_only")
    y = weight_only(tokens(rank))
    assert (y - fp8(tokens(rank))).norm() > 1e-3 * y.norm()
    return y


@cases.works("weight-only stays under FSDP2")
def _(rank: Rank) -> None:
    model = made(rank)
    set_precision(model, "*", "weight_only")
    fully_shard(model)
    for _ in range(3):
        torch.testing.assert_close(model(tokens(rank)), expected(rank))


@cases.works("weight-only stays under tensor parallelism")
def _(rank: Rank) -> None:
    model = made(rank)
    set_precision(model, "*", "weight_only")
    parallelize_module(model, mesh(rank), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for _ in range(3):
        torch.testing.assert_close(model(tokens(rank)), expected(rank))


@cases.refuses("FSDP2 of a model that runs on its originals", "which is not split")
def _(rank: Rank) -> None:
    model = made(rank, "keep")
    set_precision(model, "*", "original")
    fully_shard(model)


@cases.refuses("tensor parallelism of a model that runs on its originals", "which is not split")
def _(rank: Rank) -> None:
    model = made(rank, "keep")
    set_precision(model, "*", "original")
    parallelize_module(model, mesh(rank), {"0": ColwiseParallel(), "2": RowwiseParallel()})


@cases.refuses("a precision that is set after the split", "0 is split among processes: set the precision before")
def _(rank: Rank) -> None:
    set_precision(fully_shard(made(rank)), "*", "weight_only")


@pytest.mark.parametrize("case", cases.all(), ids=str)
def test_precision(case: Case, world: int, backend: str) -> None:
    case.check(world, backend)
