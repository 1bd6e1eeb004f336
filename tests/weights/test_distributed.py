"""FP8 weights in two processes over gloo: DDP, FSDP2, tensor parallelism, collectives, distributed checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fp8gemm import FP8GemmOptions, UnsupportedError, disable_fp8_gemm, enable_fp8_gemm, report
from fp8gemm.weights import FP8Weight, convert

WORLD = 2
AREAS: dict[str, Callable[[int], None]] = {}


def area(check: Callable[[int], None]) -> Callable[[int], None]:
    """Registers a check that each of the processes runs with its rank."""
    AREAS[check.__name__] = check
    return check


def mlp(n: int = 96, scheme: str = "row", seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, n, dtype=dtype), nn.GELU(), nn.Linear(n, 64, dtype=dtype))
    return enable_fp8_gemm(model.requires_grad_(False), options=FP8GemmOptions(scheme=scheme))


def tokens(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(5)).to(dtype)


def same_everywhere(tensor: torch.Tensor) -> bool:
    mine = tensor.detach().contiguous().view(-1).view(torch.uint8)
    others = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(others, mine)
    return all(other.equal(mine) for other in others)


def bytes_of(weight: FP8Weight) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = weight.scaled()
    return scaled.data.view(torch.uint8), scaled.scale


def raises_everywhere(act: Callable[[], object], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        act()


class Headed(nn.Module):
    """A frozen FP8 model with a trainable head."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = mlp(seed=seed, dtype=dtype)
        self.head = nn.Linear(64, 8, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@area
def ddp(rank: int) -> None:
    """The other ranks get rank 0's bytes and scales bit for bit, and gradients are averaged."""
    from torch.nn.parallel import DistributedDataParallel

    for dtype, options in (
        (torch.float32, {}),
        (torch.bfloat16, {"find_unused_parameters": True}),
        (torch.bfloat16, {"gradient_as_bucket_view": True}),
    ):
        model, first = Headed(rank, dtype), Headed(0, dtype)
        if "find_unused_parameters" in options:
            model.unused = nn.Linear(4, 4)
        wrapped = DistributedDataParallel(model, **options)
        for mine, theirs in ((model.body[0], first.body[0]), (model.body[2], first.body[2])):
            assert all(a.equal(b) for a, b in zip(bytes_of(mine.weight), bytes_of(theirs.weight), strict=True))
            assert mine.bias.equal(theirs.bias)
            assert mine.activity.dequantizations == 0
        wrapped(tokens(dtype) * (rank + 1)).square().sum().backward()
        assert sum(model.body[0].activity.kernels.values()) == 1
        grads = []
        for factor in (1, 2):
            first.zero_grad()
            first(tokens(dtype) * factor).square().sum().backward()
            grads.append(first.head.weight.grad.clone())
        torch.testing.assert_close(model.head.weight.grad, (grads[0] + grads[1]) / 2)
    kept = nn.Linear(64, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        kept.weight.mul_(rank + 1)
    enable_fp8_gemm(kept, options=FP8GemmOptions(fp16_weight_storage="keep"))
    kept.weight.requires_grad_(False)
    DistributedDataParallel(kept)
    assert same_everywhere(kept.original_weight)
    assert all(map(same_everywhere, bytes_of(kept.weight)))


SHAPES = [
    ("row", 96),
    ("row", 97),
    ("tensor", 96),
    ("tensor", 97),
    ("block", 256),
    ("block", 192),
    ("block", 97),
    ("block", 1),
    ("tensor", 1),
]


class Adapted(nn.Module):
    """A frozen FP8 model with a trainable low-rank adapter."""

    def __init__(self, scheme: str, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = mlp(n, scheme, dtype=dtype)
        self.down, self.up = nn.Linear(64, 4, bias=False, dtype=dtype), nn.Linear(4, 64, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.body(x) + self.up(self.down(x)))


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compares up to the order of sums; with 16 bits, the rounding of their results may then differ."""
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected)
    else:
        assert (found - expected).norm() <= 0.01 * expected.norm()


@area
def fsdp2(rank: int) -> None:
    """Each rank stores its rows in FP8; forward pass and adapter gradients equal those of a single process."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for scheme, n in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            alone, model = Adapted(scheme, n, dtype), Adapted(scheme, n, dtype)
            for layer in (model.body[0], model.body[2]):
                fully_shard(layer)
            fully_shard(model)
            shards = [model.body[place].weight.to_local() for place in (0, 2)]
            if n == 1:  # four bytes of a scale do not fit into a row of one
                assert type(shards.pop()) is torch.Tensor
            assert all(type(shard) is FP8Weight for shard in shards)
            for shard, full in zip(shards, ((n, 64), (64, n)), strict=False):
                rows = -(-full[0] // WORLD)
                assert shard.shape == (max(0, min(rows, full[0] - rank * rows)), full[1])
                scaled = shard.scaled()
                assert scaled.data.nbytes == rows * full[1]
                assert scaled.scale.nbytes <= 4 * (scaled.data.shape[0] * -(-scaled.data.shape[1] // 128))
            x = tokens(dtype)
            for _ in range(3):
                y = model(x)
                same(y, alone(x))
                assert isinstance(model.body[0].weight, DTensor)
                gathered = model.body[0]._get_fsdp_state()._fsdp_param_group.fsdp_params[0]
                assert [t.untyped_storage().size() for t in gathered.all_gather_outputs] == [0, 0]
                assert gathered.unsharded_param._home.stored.packed is None
            y.square().sum().backward()
            alone(x).square().sum().backward()
            for name in ("down", "up"):
                grad = getattr(model, name).weight.grad.full_tensor()
                same(grad, getattr(alone, name).weight.grad)
            assert model.body[0].activity.dequantizations <= 2  # in backward only
            for place in (0, 2)[: len(shards)]:
                whole, expected = model.body[place].weight.full_tensor(), alone.body[place].weight
                assert values(whole).equal(expected.dequantize())
                assert n == 1 or equal(whole.clone(), expected)  # the clone is without padding


class Turned(nn.Module):
    """``x @ weight`` for a weight [K, N], as transformers' Conv1D has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(64, 96), requires_grad=False)
        convert(self, "weight", FP8GemmOptions(), turned=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@area
def fsdp2_settings(rank: int) -> None:
    """Other dtypes, gathered weights that are kept or copied, writes to shards, and unsupported layouts."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    x = tokens()
    half = fully_shard(mlp(97), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    y = half(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), mlp(97)(x), rtol=0.03, atol=0.03)

    stays = fully_shard(mlp(97), reshard_after_forward=False)
    for _ in range(2):
        torch.testing.assert_close(stays(x), mlp(97)(x))
        assert type(stays[0].weight) is FP8Weight
    copied, cast = stays[0].weight.clone(), stays[0].weight.to(torch.bfloat16)
    stays.reshard()
    assert equal(copied, mlp(97)[0].weight)
    assert cast.dequantize().equal(mlp(97)[0].weight.to(torch.bfloat16).dequantize())

    for scheme, n in (("row", 97), ("tensor", 96), ("block", 192)):
        written, alone = fully_shard(mlp(n, scheme)), mlp(n, scheme)
        written(x)
        written.reshard()
        rows = -(-n // WORLD)
        with torch.no_grad():
            written[0].weight.to_local().mul_(1 + 2 * rank)
            alone[0].weight[rows:].mul_(3)
        torch.testing.assert_close(written(x), alone(x), rtol=0.05, atol=0.1)
        assert not torch.allclose(written(x), mlp(n, scheme)(x), rtol=0.05, atol=0.1)

    for model in (stays, written):
        row = report(model).converted[0]
        assert (row.name, row.calls) == ("0", model[0].activity.calls)
        assert "weight row" in repr(stays[0])
        raises_everywhere(lambda model=model: disable_fp8_gemm(model), "disable_fp8_gemm before sharding the model")
        model(x)

    alone = [dist.new_group([one]) for one in range(WORLD)][rank]
    for scheme in ("row", "tensor"):
        single = fully_shard(mlp(97, scheme), mesh=DeviceMesh.from_group(alone, "cpu"))
        assert single(x).equal(mlp(97, scheme)(x))

    turned = fully_shard(Turned())
    assert type(turned.weight.to_local()) is torch.Tensor  # dense, and right
    torch.testing.assert_close(turned(x), Turned()(x))


@area
def tensor_parallel(rank: int) -> None:
    """Each rank stores half of the FP8 bytes of both layers, and nothing is dequantized."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (WORLD,))
    for scheme, n in (("row", 96), ("tensor", 96), ("block", 256)):
        for dtype in (torch.float32, torch.bfloat16):
            alone = mlp(n, scheme, dtype=dtype)
            model = mlp(n, scheme, seed=rank, dtype=dtype)  # rank 0's weights count
            parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
            wide, narrow = (model[place].weight.to_local() for place in (0, 2))
            size = n // WORLD
            mine = slice(rank * size, (rank + 1) * size)
            assert (wide.shape, narrow.shape) == ((size, 64), (64, size))
            for layer, local in ((model[0], wide), (model[2], narrow)):
                assert layer.home is local._home
                data, scale = bytes_of(local)
                assert data.nbytes == n * 64 // WORLD
                assert scale.nbytes <= 4 * len(data)
            for local, layer, part in ((wide, alone[0], (mine,)), (narrow, alone[2], (slice(None), mine))):
                assert local.dequantize().equal(layer.weight.dequantize()[part])
                local.activity.dequantizations = 0
            x = tokens(dtype)
            # Half sums are rounded before they are added, and a rank that has half of each token quantizes that alone.
            tolerance = 1e-4 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(model(x), alone(x), rtol=tolerance, atol=tolerance)
            for local in (wide, narrow):
                assert local.activity.dequantizations == 0
                assert sum(local.activity.kernels.values()) == 1


@area
def distribute(rank: int) -> None:
    """Every placement has the same values, in FP8 unless it cuts a scale block, and can be undone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    for scheme, n, k in (
        ("row", 96, 64),
        ("row", 97, 65),
        ("row", 1, 8),
        ("tensor", 97, 64),
        ("block", 256, 256),
        ("block", 192, 192),
    ):
        for source in (0, None):
            for placement in (Shard(0), Shard(1), Replicate()):
                expected = linear(n, k, scheme).weight.dequantize()
                weight = linear(n, k, scheme, seed=0 if source is None else rank).weight
                placed = distribute_tensor(weight, mesh, [placement], src_data_rank=source)
                local = placed.to_local()
                mine = expected
                if isinstance(placement, Shard):
                    size = -(-(n, k)[placement.dim] // WORLD)
                    mine = (*expected.split(size, placement.dim), expected[:0])[rank]
                assert type(local) is FP8Weight or (isinstance(placement, Shard) and (n == 192 or not mine.numel()))
                assert values(local).equal(mine.view(local.shape)), (scheme, n, k, source, placement)
                assert values(placed.full_tensor()).equal(expected), (scheme, n, k, source, placement)
                replaced = placed.redistribute(placements=[Replicate()]).redistribute(placements=[Shard(1)])
                assert values(replaced.full_tensor()).equal(expected)


def linear(n: int, k: int, scheme: str = "row", seed: int = 0, **options: object) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    return enable_fp8_gemm(layer, options=FP8GemmOptions(scheme=scheme, **options))


def values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, FP8Weight) else tensor


def equal(found: FP8Weight, expected: FP8Weight) -> bool:
    return all(a.equal(b) for a, b in zip(bytes_of(found), bytes_of(expected), strict=True))


@area
def moves(rank: int) -> None:
    """Collectives that only move weights send bytes and scales: whole weights or parts, synchronous or not."""
    other = 1 - rank
    for scheme in ("row", "tensor", "block"):

        def weight(seed: int, scheme: str = scheme) -> nn.Parameter:
            return linear(256, 192, scheme, seed).weight

        ours, theirs = weight(rank), weight(other)
        target = weight(rank)
        dist.broadcast(target, 1)
        assert equal(target, weight(1))
        target = weight(rank)
        work = dist.broadcast(target.data, 0, async_op=True)
        work.wait()
        assert equal(target, weight(0))
        target = weight(rank)
        dist.broadcast(target.data[128:], 0)  # rows of it
        assert target.dequantize()[128:].equal(weight(0).dequantize()[128:])
        assert target.dequantize()[:128].equal(weight(rank).dequantize()[:128])

        dense = [torch.empty(256, 192, dtype=torch.bfloat16) for _ in range(WORLD)]
        dist.all_gather(dense, ours)
        quantized = [torch.empty_like(ours) for _ in range(WORLD)]
        dist.all_gather(quantized, ours.data)
        together = torch.empty(512, 192, dtype=torch.bfloat16)
        dist.all_gather_into_tensor(together, ours)
        for place in range(WORLD):
            assert equal(quantized[place], weight(place))
            assert dense[place].equal(weight(place).dequantize())
            assert together[256 * place : 256 * (place + 1)].equal(dense[place])
        gathered = [torch.empty_like(ours) for _ in range(WORLD)] if rank == 1 else None
        dist.gather(ours, gathered, dst=1)
        assert gathered is None or (equal(gathered[0], weight(0)) and equal(gathered[1], weight(1)))
        scattered = torch.empty_like(ours)
        dist.scatter(scattered, [weight(7), weight(8)] if rank == 0 else None, src=0)
        assert equal(scattered, weight(7 + rank))

        received = torch.empty_like(ours)
        if rank == 0:
            dist.send(ours, 1)
            dist.recv(received, 1)
        else:
            dist.recv(received, 0)
            dist.send(ours, 0)
        assert equal(received, theirs)
        received = torch.empty_like(ours)
        # both at once, so that neither waits for the other
        works = [dist.isend(ours, other), dist.irecv(received, other)]
        for work in works:
            work.wait()
        assert equal(received, theirs)
        assert ours.activity.dequantizations == 0


@area
def reductions(rank: int) -> None:
    """Collectives that compute use values, also if a rank's weight has pending writes or another scheme."""
    ours, both = linear(96, 64, seed=rank).weight, [linear(96, 64, seed=seed).weight.dequantize() for seed in (0, 1)]
    dense = both[rank].clone()
    target = ours.data.clone()
    dist.all_reduce(target)
    dist.all_reduce(dense)
    assert values(target).equal(dense)
    for destination in (0, 1):
        target, dense = ours.data.clone(), both[rank].clone()
        dist.reduce(target, destination)
        assert values(target).equal(both[0] + both[1] if rank == destination else both[rank])
    shard = torch.empty(48, 64, dtype=torch.bfloat16)
    dist.reduce_scatter_tensor(shard, ours)
    assert shard.equal((both[0] + both[1])[48 * rank : 48 * (rank + 1)])

    written = ours.data.clone()
    if rank == 0:
        written.mul_(3)  # a temporary copy, which now has dense values
    dist.broadcast(written, 0)
    assert values(written).equal(both[0] * 3)
    mixed = linear(96, 64, "row" if rank == 0 else "tensor", seed=rank).weight
    dist.broadcast(mixed, 0)
    torch.testing.assert_close(values(mixed), both[0], rtol=0.07, atol=1e-3)
    kept = linear(96, 64, seed=rank, fp16_weight_storage="keep")
    dist.broadcast(kept.weight, 1)
    assert same_everywhere(kept.original_weight)
    assert all(map(same_everywhere, bytes_of(kept.weight)))
    raises_everywhere(
        lambda: dist.broadcast(linear(96, 64 + 8 * rank).weight, 0), "weights of the same shape and dtype on all ranks"
    )
    alone = [dist.new_group([one]) for one in range(WORLD)][rank]
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):  # torch shows us no such list: no crash
        dist.scatter(torch.empty(96, 64, dtype=torch.bfloat16), [ours.data], src=rank, group=alone)


@area
def stacks(rank: int) -> None:
    """Experts are sharded as a whole, also in uneven numbers, for parameters [E, N, K] and [E, K, N]."""
    from torch.distributed.fsdp import fully_shard

    class Experts(nn.Module):
        def __init__(self, count: int, turned: bool, scheme: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            size = (count, 64, 96) if turned else (count, 96, 64)
            self.stack = nn.Parameter(torch.randn(size, dtype=torch.bfloat16), requires_grad=False)
            convert(self, "stack", FP8GemmOptions(scheme=scheme), turned=turned)
            self.turned = turned

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(x, self.stack if self.turned else self.stack.transpose(1, 2))

    for count in (4, 3, 1):
        for turned in (False, True):
            for scheme in ("row", "tensor", "block"):
                alone, model = Experts(count, turned, scheme), Experts(count, turned, scheme)
                fully_shard(model)
                local = model.stack.to_local()
                held = -(-count // WORLD)
                assert type(local) is FP8Weight
                assert local.shape[0] == max(0, min(held, count - rank * held))
                assert local.scaled().data.nbytes == held * 96 * 64
                x = torch.randn(count, 5, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
                for _ in range(2):
                    assert model(x).equal(alone(x)), (count, turned, scheme)
                assert local.activity.dequantizations == 0


@area
def checkpoints(rank: int) -> None:
    """torch.distributed.checkpoint saves and loads replicated models, and models sharded by FSDP2, bit for bit."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    folder = Path(sys.argv[3]).parent
    for scheme, n in (("row", 97), ("block", 192)):
        saved, loaded = mlp(n, scheme, seed=0), mlp(n, scheme, seed=1 + rank)
        y = saved(tokens())
        dcp.save(saved.state_dict(), checkpoint_id=folder / f"replicated {scheme}")
        state = loaded.state_dict()
        dcp.load(state, checkpoint_id=folder / f"replicated {scheme}")
        loaded.load_state_dict(state)
        assert loaded(tokens()).equal(y)
        assert equal(loaded[0].weight, saved[0].weight)

        loaded = mlp(n, scheme, seed=2)
        for model in (saved, loaded):
            for layer in (model[0], model[2], model):
                fully_shard(layer)
        dcp.save(saved.state_dict(), checkpoint_id=folder / f"sharded {scheme}")
        assert not torch.allclose(loaded(tokens()), y, atol=0.1)
        state = loaded.state_dict()
        dcp.load(state, checkpoint_id=folder / f"sharded {scheme}")
        loaded.load_state_dict(state)
        torch.testing.assert_close(loaded(tokens()), y)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", AREAS)
def test_two_processes(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", __file__, name]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(WORLD)
    ]
    try:
        told = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(told)


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, rank, store = sys.argv[1:]
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, WORLD), rank=int(rank), world_size=WORLD, timeout=timedelta(seconds=60)
    )
    AREAS[name](int(rank))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch 2.10's gloo may abort while the interpreter ends
