"""Stacks of experts: sharded as a whole by FSDP2, and expert parallelism, where each rank runs its own experts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import Case, Cases, Rank
from small import mesh, rows_of, values
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from fp8gemm import FP8GemmOptions, enable_fp8_gemm
from fp8gemm.weights import FP8Weight, convert

cases = Cases("Experts")


class Experts(nn.Module):
    """Experts ``[E, N, K]``, or ``[E, K, N]`` if they are turned."""

    def __init__(self, rank: Rank, count: int, turned: bool = False, size: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape = (count, size or 64, size or 96) if turned else (count, size or 96, size or 64)
        self.stack = nn.Parameter(torch.randn(shape, dtype=torch.bfloat16).to(rank.device), requires_grad=False)
        self.turned = turned

    def patched(self, scheme: str) -> Experts:
        convert(self, "stack", FP8GemmOptions(scheme=scheme), turned=self.turned)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.stack if self.turned else self.stack.transpose(1, 2))


def inputs(rank: Rank, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 5, 64, dtype=torch.bfloat16, generator=generator).to(rank.device)


@cases.works("FSDP2 of stacks, of even and uneven numbers of experts")
def _(rank: Rank) -> None:
    for count in (2 * rank.world, rank.world + 1, 1):
        for turned in (False, True):
            for scheme in ("row", "tensor", "block"):
                one, model = (Experts(rank, count, turned).patched(scheme) for _ in range(2))
                fully_shard(model)
                local, mine = model.stack.to_local(), rows_of(count, rank)
                assert type(local) is FP8Weight
                assert local.shape[0] == mine.stop - mine.start
                assert local.scaled().data.nbytes == -(-count // rank.world) * 96 * 64
                x = inputs(rank, count)
                for _ in range(2):
                    assert model(x).equal(one(x)), (count, turned, scheme)
                assert local.activity.dequantizations == 0


@cases.works("stacks split by rows or columns within each expert, patched before or after")
def _(rank: Rank) -> None:
    for scheme in ("row", "tensor", "block"):
        for turned in (False, True):
            for dim in (1, 2):
                for patch_first in (True, False):
                    one, model = Experts(rank, 3, turned, size=192).patched(scheme), Experts(rank, 3, turned, size=192)
                    model = model.patched(scheme) if patch_first else model
                    placed = distribute_tensor(model.stack, mesh(rank), [Shard(dim)])
                    model.stack = nn.Parameter(placed, requires_grad=False)
                    model = model if patch_first else model.patched(scheme)
                    local, mine = model.stack.to_local(), [slice(None), slice(None), slice(None)]
                    mine[dim] = rows_of(192, rank)
                    assert type(local) is FP8Weight, (scheme, turned, dim, patch_first)
                    assert local.dequantize().equal(one.stack.dequantize()[tuple(mine)])
                    assert local.numel() * rank.world == one.stack.numel()


class Mixture(nn.Module):
    """A mixture whose tokens go to one expert each; with a mesh, every rank runs its own experts and outputs add up."""

    def __init__(self, rank: Rank, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(64, count, device=rank.device)
        self.gate_up_proj = nn.Parameter(torch.randn(count, 192, 64).to(rank.device) / 8)
        self.down_proj = nn.Parameter(torch.randn(count, 64, 96).to(rank.device) / 8)
        self.first, self.parallel = 0, False

    def split(self, rank: Rank) -> Mixture:
        for name in ("gate_up_proj", "down_proj"):
            whole = getattr(self, name)
            placed = distribute_tensor(whole, mesh(rank), [Shard(0)])
            self.register_parameter(name, nn.Parameter(placed, requires_grad=False))
        self.first, self.parallel = rows_of(whole.shape[0], rank).start, True
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
        up, down = (w.to_local() if self.parallel else w for w in (self.gate_up_proj, self.down_proj))
        for place in range(up.shape[0]):
            here = chosen == place + self.first
            gate, value = nn.functional.linear(x[here], up[place]).chunk(2, -1)
            y[here] = nn.functional.linear(nn.functional.silu(gate) * value, down[place])
        if self.parallel:
            dist.all_reduce(y)
        return y


@cases.works("experts split among ranks, patched before or after")
def _(rank: Rank) -> None:
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(2)).to(rank.device)
    for count in (2 * rank.world, rank.world + 1):
        for scheme in ("row", "tensor", "block"):
            options = FP8GemmOptions(scheme=scheme)
            one = enable_fp8_gemm(Mixture(rank, count), options=options)
            for patch_first in (True, False):
                model = Mixture(rank, count)
                if patch_first:
                    enable_fp8_gemm(model, options=options)
                model.split(rank)
                if not patch_first:
                    enable_fp8_gemm(model, options=options)
                mine = rows_of(count, rank)
                for name in ("gate_up_proj", "down_proj"):
                    local, whole = getattr(model, name).to_local(), getattr(one, name)
                    assert type(local) is FP8Weight or not local.numel()
                    assert values(local).equal(whole.dequantize()[mine].reshape(local.shape))
                    assert local.numel() == (mine.stop - mine.start) * whole[0].numel()
                torch.testing.assert_close(model(x), one(x))


@pytest.mark.parametrize("case", cases.all(), ids=str)
def test_expert_parallel(case: Case, world: int, backend: str) -> None:
    case.check(world, backend)
