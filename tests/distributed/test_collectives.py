"""torch.distributed's own collectives and DTensor placements with FP8 weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import Case, Cases, Rank
from small import alone, bytes_of, equal, linear, mesh, same_everywhere, values
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fp8gemm.weights import FP8Weight

cases = Cases("Collectives and DTensor")


def weight_of(rank: Rank, scheme: str, seed: int) -> nn.Parameter:
    return linear(rank, 256, 192, scheme, seed).weight


@cases.works("broadcast of whole weights and of rows, synchronous or not, moves bytes")
def _(rank: Rank) -> None:
    for scheme in ("row", "tensor", "block"):
        first, last = weight_of(rank, scheme, 0), weight_of(rank, scheme, rank.world - 1)
        target = weight_of(rank, scheme, rank.number)
        dist.broadcast(target, rank.world - 1)
        assert equal(target, last)
        target = weight_of(rank, scheme, rank.number)
        dist.broadcast(target.data, 0, async_op=True).wait()
        assert equal(target, first)
        target, mine = weight_of(rank, scheme, rank.number), weight_of(rank, scheme, rank.number)
        dist.broadcast(target.data[128:], 0)
        assert target.dequantize()[128:].equal(first.dequantize()[128:])
        assert target.dequantize()[:128].equal(mine.dequantize()[:128])


@cases.works("all_gather, gather and scatter move bytes")
def _(rank: Rank) -> None:
    for scheme in ("row", "tensor", "block"):
        ours = weight_of(rank, scheme, rank.number)
        dense = [torch.empty(256, 192, dtype=torch.bfloat16, device=rank.device) for _ in range(rank.world)]
        dist.all_gather(dense, ours)
        quantized = [torch.empty_like(ours) for _ in range(rank.world)]
        dist.all_gather(quantized, ours.data)
        together = torch.empty(256 * rank.world, 192, dtype=torch.bfloat16, device=rank.device)
        dist.all_gather_into_tensor(together, ours)
        assert ours.activity.dequantizations == 0
        for place in range(rank.world):
            assert equal(quantized[place], weight_of(rank, scheme, place))
            assert dense[place].equal(weight_of(rank, scheme, place).dequantize())
            assert together[256 * place : 256 * (place + 1)].equal(dense[place])
        gathered = [torch.empty_like(ours) for _ in range(rank.world)] if rank.number == 1 else None
        dist.gather(ours, gathered, dst=1)
        for place, found in enumerate(gathered or []):
            assert equal(found, weight_of(rank, scheme, place))
        scattered = torch.empty_like(ours)
        given = [weight_of(rank, scheme, 7 + place) for place in range(rank.world)]
        dist.scatter(scattered, given if rank.number == 0 else None, src=0)
        assert equal(scattered, given[rank.number])


@cases.works("send and recv, isend and irecv move bytes")
def _(rank: Rank) -> None:
    behind, ahead = (rank.number - 1) % rank.world, (rank.number + 1) % rank.world
    for scheme in ("row", "tensor", "block"):
        ours = weight_of(rank, scheme, rank.number)
        received = torch.empty_like(ours)
        if rank.number:
            dist.recv(received, behind)
        dist.send(ours, ahead)
        if not rank.number:
            dist.recv(received, behind)
        assert equal(received, weight_of(rank, scheme, behind))
        received = torch.empty_like(ours)
        # all at once, so that none waits for another
        works = [dist.isend(ours, ahead), dist.irecv(received, behind)]
        for work in works:
            work.wait()
        assert equal(received, weight_of(rank, scheme, behind))
        assert ours.activity.dequantizations == 0


@cases.works("all_reduce, reduce and reduce_scatter add values")
def _(rank: Rank) -> None:
    every = [linear(rank, 96, 64, seed=seed).weight.dequantize() for seed in range(rank.world)]
    ours, total = linear(rank, 96, 64, seed=rank.number).weight, sum(w.float() for w in every)
    target = ours.data.clone()
    dist.all_reduce(target)
    torch.testing.assert_close(values(target).float(), total, rtol=0.02, atol=0.01)
    for destination in range(rank.world):
        target = ours.data.clone()
        dist.reduce(target, destination)
        if rank.number == destination:
            torch.testing.assert_close(values(target).float(), total, rtol=0.02, atol=0.01)
        else:
            assert values(target).equal(every[rank.number])
    size = 96 // rank.world
    shard = torch.empty(size, 64, dtype=torch.bfloat16, device=rank.device)
    dist.reduce_scatter_tensor(shard, ours)
    torch.testing.assert_close(
        shard.float(), total[size * rank.number : size * (rank.number + 1)], rtol=0.02, atol=0.01
    )


@cases.works("pending writes, other schemes and kept originals travel as values")
def _(rank: Rank) -> None:
    first = linear(rank, 96, 64, seed=0).weight.dequantize()
    written = linear(rank, 96, 64, seed=rank.number).weight.data.clone()
    if rank.number == 0:
        written.mul_(3)  # a temporary copy, which now has dense values
    dist.broadcast(written, 0)
    assert values(written).equal(first * 3)
    mixed = linear(rank, 96, 64, "tensor" if rank.number else "row", seed=rank.number).weight
    dist.broadcast(mixed, 0)
    torch.testing.assert_close(values(mixed), first, rtol=0.07, atol=1e-3)
    kept = linear(rank, 96, 64, seed=rank.number, fp16_weight_storage="keep")
    dist.broadcast(kept.weight, 1)
    assert same_everywhere(rank, kept.original_weight)
    assert all(same_everywhere(rank, part) for part in bytes_of(kept.weight))


@cases.refuses("weights of different shapes", "weights of the same shape and dtype on all ranks")
def _(rank: Rank) -> None:
    dist.broadcast(linear(rank, 96, 64 + 8 * rank.number).weight, 0)


@cases.refuses("scatter of an FP8 weight into a dense tensor", "Cannot access data pointer")
def _(rank: Rank) -> None:
    target = torch.empty(96, 64, dtype=torch.bfloat16, device=rank.device)  # torch shows us no such list: no crash
    dist.scatter(target, [linear(rank, 96, 64).weight.data], src=rank.number, group=alone(rank))


@cases.works("distribute_tensor, full_tensor and redistribute, of even and uneven shards")
def _(rank: Rank) -> None:
    """Every placement has the same values, in FP8 unless it cuts a scale block, and can be undone."""
    place = mesh(rank)
    shapes = [("row", 96, 64), ("row", 97, 65), ("row", 1, 8), ("tensor", 97, 64), ("block", 256, 256)]
    for scheme, n, k in [*shapes, ("block", 192, 192)]:
        for source in (0, None):
            for placement in (Shard(0), Shard(1), Replicate()):
                expected = linear(rank, n, k, scheme).weight.dequantize()
                weight = linear(rank, n, k, scheme, seed=0 if source is None else rank.number).weight
                placed = distribute_tensor(weight, place, [placement], src_data_rank=source)
                local, mine = placed.to_local(), expected
                if isinstance(placement, Shard):
                    size = -(-(n, k)[placement.dim] // rank.world)
                    parts = list(expected.split(size, placement.dim))
                    nothing = expected.narrow(placement.dim, 0, 0)
                    mine = (*parts, *[nothing] * rank.world)[rank.number]
                where = (scheme, n, k, source, placement)
                cuts = scheme == "block" and isinstance(placement, Shard) and (n // rank.world) % 128
                assert type(local) is FP8Weight or cuts or not mine.numel(), where
                assert values(local).equal(mine.view(local.shape)), where
                assert values(placed.full_tensor()).equal(expected), where
                replaced = placed.redistribute(placements=[Replicate()]).redistribute(placements=[Shard(1)])
                assert values(replaced.full_tensor()).equal(expected), where


def test_nccl_is_reported() -> None:
    """The tests of this folder run over NCCL as well, where there are GPUs for as many ranks."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"NCCL needs two GPUs, found {torch.cuda.device_count()}: several processes met over gloo only")
    assert torch.distributed.is_nccl_available()


@pytest.mark.parametrize("case", cases.all(), ids=str)
def test_collectives(case: Case, world: int, backend: str) -> None:
    case.check(world, backend)
