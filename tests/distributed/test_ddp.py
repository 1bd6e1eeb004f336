"""DistributedDataParallel around models with FP8 weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Case, Cases, Rank
from small import bytes_of, mlp, same_everywhere, tokens
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fp8gemm import FP8GemmOptions, enable_fp8_gemm

cases = Cases("DistributedDataParallel")


class Headed(nn.Module):
    """A frozen FP8 model with a trainable head and a buffer."""

    def __init__(self, rank: Rank, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = mlp(rank, seed=seed, dtype=dtype)
        self.head = nn.Linear(64, 8, dtype=dtype, device=rank.device)
        self.register_buffer("shift", torch.full((64,), float(seed), dtype=dtype, device=rank.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x) + self.shift)


def trains_like_one_process(rank: Rank, dtype: torch.dtype, **options: Any) -> None:
    """The other ranks get rank 0's bytes and scales bit for bit, and gradients are averaged."""
    model, first = Headed(rank, rank.number, dtype), Headed(rank, 0, dtype)
    if options.get("find_unused_parameters"):
        model.unused = nn.Linear(4, 4, device=rank.device)
    wrapped = DistributedDataParallel(model, **options)
    for mine, theirs in ((model.body[0], first.body[0]), (model.body[2], first.body[2])):
        assert all(a.equal(b) for a, b in zip(bytes_of(mine.weight), bytes_of(theirs.weight), strict=True))
        assert mine.bias.equal(theirs.bias)
        assert mine.activity.dequantizations == 0
    wrapped(tokens(rank, dtype) * (rank.number + 1)).square().sum().backward()
    assert model.shift.equal(first.shift)
    assert sum(model.body[0].activity.kernels.values()) == 1
    grads = []
    for factor in range(1, rank.world + 1):
        first.zero_grad()
        first(tokens(rank, dtype) * factor).square().sum().backward()
        grads.append(first.head.weight.grad.clone())
    torch.testing.assert_close(model.head.weight.grad, sum(grads) / rank.world)


@cases.works("broadcast of weights and buffers, averaged gradients")
def _(rank: Rank) -> None:
    trains_like_one_process(rank, torch.float32)


@cases.works("find_unused_parameters")
def _(rank: Rank) -> None:
    trains_like_one_process(rank, torch.bfloat16, find_unused_parameters=True)


@cases.works("gradient_as_bucket_view, static_graph")
def _(rank: Rank) -> None:
    trains_like_one_process(rank, torch.bfloat16, gradient_as_bucket_view=True)
    trains_like_one_process(rank, torch.float32, static_graph=True)


@cases.works("kept originals follow rank 0")
def _(rank: Rank) -> None:
    kept = nn.Linear(64, 96, dtype=torch.bfloat16, device=rank.device)
    with torch.no_grad():
        kept.weight.mul_(rank.number + 1)
    enable_fp8_gemm(kept, options=FP8GemmOptions(fp16_weight_storage="keep"))
    kept.weight.requires_grad_(False)
    DistributedDataParallel(kept)
    assert same_everywhere(rank, kept.original_weight)
    assert all(same_everywhere(rank, part) for part in bytes_of(kept.weight))


@pytest.mark.parametrize("case", cases.all(), ids=str)
def test_ddp(case: Case, world: int, backend: str) -> None:
    case.check(world, backend)
