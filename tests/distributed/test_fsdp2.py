"""FSDP2: each rank stores its rows in FP8, and what is gathered is freed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Case, Cases, Rank
from small import alone, dense_mlp, equal, mlp, rows_of, same, tokens, values
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fp8gemm import disable_fp8_gemm, enable_fp8_gemm, load_checkpoint, report, save_checkpoint
from fp8gemm.scaled import FP8GemmOptions
from fp8gemm.weights import FP8Weight, convert

cases = Cases("FSDP2")


class Adapted(nn.Module):
    """A frozen FP8 model with a trainable low-rank adapter."""

    def __init__(self, rank: Rank, scheme: str, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = mlp(rank, n, scheme, dtype=dtype)
        self.down = nn.Linear(64, 4, bias=False, dtype=dtype, device=rank.device)
        self.up = nn.Linear(4, 64, bias=False, dtype=dtype, device=rank.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.body(x) + self.up(self.down(x)))


def shard(model: nn.Module, layers: Any, **options: Any) -> nn.Module:
    for layer in layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def check_shards(rank: Rank, model: nn.Module, scheme: str, n: int) -> list[FP8Weight]:
    """The local bytes are this rank's rows, padded to the size of the largest shard."""
    shards = [model.body[place].weight.to_local() for place in (0, 2)]
    if n == 1:  # four bytes of a scale do not fit into a row of one
        assert type(shards.pop()) is torch.Tensor
    assert all(type(part) is FP8Weight for part in shards)
    for part, full in zip(shards, ((n, 64), (64, n)), strict=False):
        mine = rows_of(full[0], rank)
        assert part.shape == (mine.stop - mine.start, full[1])
        scaled = part.scaled()
        assert scaled.data.nbytes == -(-full[0] // rank.world) * full[1]
        assert scaled.scale.nbytes <= 4 * (scaled.data.shape[0] * -(-scaled.data.shape[1] // 128))
    return shards


def runs_like_one_process(rank: Rank, scheme: str, n: int, dtype: torch.dtype) -> None:
    one, model = Adapted(rank, scheme, n, dtype), Adapted(rank, scheme, n, dtype)
    shard(model, (model.body[0], model.body[2]))
    shards = check_shards(rank, model, scheme, n)
    x = tokens(rank, dtype)
    for _ in range(3):
        y = model(x)
        same(y, one(x))
        assert isinstance(model.body[0].weight, DTensor)
        gathered = model.body[0]._get_fsdp_state()._fsdp_param_group.fsdp_params[0]
        assert [t.untyped_storage().size() for t in gathered.all_gather_outputs] == [0, 0]
        assert gathered.unsharded_param._home.stored.packed is None
    y.square().sum().backward()
    one(x).square().sum().backward()
    for name in ("down", "up"):
        same(getattr(model, name).weight.grad.full_tensor(), getattr(one, name).weight.grad)
    assert model.body[0].activity.dequantizations <= 2  # in backward only
    for place in (0, 2)[: len(shards)]:
        whole, expected = model.body[place].weight.full_tensor(), one.body[place].weight
        assert values(whole).equal(expected.dequantize())
        assert n == 1 or equal(whole.clone(), expected)  # the clone is without padding


@cases.works("local bytes are a share of the FP8 bytes, and are freed after forward; row scales")
def _(rank: Rank) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        runs_like_one_process(rank, "row", 96, dtype)


@cases.works("uneven shards and empty ones, for every scheme")
def _(rank: Rank) -> None:
    shapes = [("row", 97), ("tensor", 96), ("tensor", 97), ("block", 256), ("block", 192), ("block", 97)]
    for scheme, n in [*shapes, ("block", 1), ("tensor", 1)]:
        runs_like_one_process(rank, scheme, n, torch.float32)
    runs_like_one_process(rank, "block", 192, torch.bfloat16)


@cases.works("mixed precision")
def _(rank: Rank) -> None:
    half = fully_shard(mlp(rank, 97), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    y = half(tokens(rank))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), mlp(rank, 97)(tokens(rank)), rtol=0.03, atol=0.03)


@cases.works("reshard_after_forward=False, and copies of gathered weights")
def _(rank: Rank) -> None:
    x, stays = tokens(rank), fully_shard(mlp(rank, 97), reshard_after_forward=False)
    for _ in range(2):
        torch.testing.assert_close(stays(x), mlp(rank, 97)(x))
        assert type(stays[0].weight) is FP8Weight
    copied, cast = stays[0].weight.clone(), stays[0].weight.to(torch.bfloat16)
    stays.reshard()
    assert equal(copied, mlp(rank, 97)[0].weight)
    assert cast.dequantize().equal(mlp(rank, 97)[0].weight.to(torch.bfloat16).dequantize())
    row = report(stays).converted[0]
    assert (row.name, row.calls) == ("0", stays[0].activity.calls)
    assert "weight row" in repr(stays[0])


@cases.works("offload to the CPU")
def _(rank: Rank) -> None:
    away = fully_shard(mlp(rank, 97), offload_policy=CPUOffloadPolicy(pin_memory=rank.device.type == "cuda"))
    assert away[0].weight.to_local().device.type == "cpu"
    torch.testing.assert_close(away(tokens(rank)), mlp(rank, 97)(tokens(rank)))


@cases.works("writes to shards reach the gathered weight")
def _(rank: Rank) -> None:
    x = tokens(rank)
    for scheme, n in (("row", 97), ("tensor", 96), ("block", 192)):
        written, one = fully_shard(mlp(rank, n, scheme)), mlp(rank, n, scheme)
        written(x)
        written.reshard()
        rows = -(-n // rank.world)
        with torch.no_grad():
            written[0].weight.to_local().mul_(1 + 2 * (rank.number > 0))
            one[0].weight[rows:].mul_(3)
        torch.testing.assert_close(written(x), one(x), rtol=0.05, atol=0.1)
        assert not torch.allclose(written(x), mlp(rank, n, scheme)(x), rtol=0.05, atol=0.1)


@cases.refuses("undo of a sharded model", "disable_fp8_gemm before sharding the model")
def _(rank: Rank) -> None:
    disable_fp8_gemm(fully_shard(mlp(rank)))


@cases.works("a mesh of one rank")
def _(rank: Rank) -> None:
    own = DeviceMesh.from_group(alone(rank), rank.device.type)
    for scheme in ("row", "tensor"):
        assert fully_shard(mlp(rank, 97, scheme), mesh=own)(tokens(rank)).equal(mlp(rank, 97, scheme)(tokens(rank)))


@cases.works("replicas of shards (HSDP)")
def _(rank: Rank) -> None:
    shards = rank.world // 2 if rank.world > 2 else 2
    grid = init_device_mesh(rank.device.type, (rank.world // shards, shards), mesh_dim_names=("replicate", "shard"))
    for scheme, n in (("row", 97), ("block", 192)):
        one, model = Adapted(rank, scheme, n, torch.float32), Adapted(rank, scheme, n, torch.float32)
        shard(model, (model.body[0], model.body[2]), mesh=grid)
        assert type(model.body[0].weight.to_local()) is FP8Weight
        same(model(tokens(rank)), one(tokens(rank)))


class Turned(nn.Module):
    """``x @ weight`` for a weight [K, N], as transformers' Conv1D has it."""

    def __init__(self, rank: Rank) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(64, 96).to(rank.device), requires_grad=False)
        convert(self, "weight", FP8GemmOptions(), turned=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@cases.works("transposed weights, as those of Conv1D: their shards are dense")
def _(rank: Rank) -> None:
    turned = fully_shard(Turned(rank))
    assert type(turned.weight.to_local()) is torch.Tensor
    torch.testing.assert_close(turned(tokens(rank)), Turned(rank)(tokens(rank)))


@cases.works("patched after fully_shard")
def _(rank: Rank) -> None:
    x = tokens(rank)
    for scheme, n in (("row", 97), ("tensor", 96), ("block", 192), ("block", 256)):
        model = dense_mlp(rank, n)
        shard(model, (model[0], model[2]))
        if scheme == "row":
            model(x)  # FSDP2 has made its plans
        enable_fp8_gemm(model, options=FP8GemmOptions(scheme=scheme))
        one = mlp(rank, n, scheme)
        for place in (0, 2):
            assert type(model[place].weight.to_local()) is FP8Weight
            assert values(model[place].weight.full_tensor()).equal(one[place].weight.dequantize())
        for _ in range(2):
            same(model(x), one(x))
        assert isinstance(model[0].weight, DTensor)
        assert {row.name for row in report(model).converted} == {"0", "2"}


@cases.refuses("patching weights that FSDP2 holds gathered", "gathered at the moment: call reshard()")
def _(rank: Rank) -> None:
    model = fully_shard(dense_mlp(rank), reshard_after_forward=False)
    model(tokens(rank))
    enable_fp8_gemm(model)


@cases.refuses("patching weights that FSDP2 has sharded on top of tensor parallelism", "before fully_shard")
def _(rank: Rank) -> None:
    grid = init_device_mesh(rank.device.type, (1, rank.world), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(dense_mlp(rank), grid["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    enable_fp8_gemm(fully_shard(model, mesh=grid["dp"]))


@cases.refuses("loading a state dict into gathered weights", "call model.reshard() before load_state_dict")
def _(rank: Rank) -> None:
    model = fully_shard(mlp(rank), reshard_after_forward=False)
    state = model.state_dict()
    model(tokens(rank))
    model.load_state_dict(state)


@cases.works("an FP8 checkpoint straight into the shards of a model on meta")
def _(rank: Rank) -> None:
    for scheme, n in (("row", 97), ("tensor", 96), ("block", 192)):
        one, folder = mlp(rank, n, scheme), rank.folder / scheme
        if rank.number == 0:
            save_checkpoint(one, folder)
        dist.barrier()
        for meta in (True, False):
            model = dense_mlp(rank, n, seed=7)
            model = model.to("meta") if meta else model
            shard(model, (model[0], model[2]))
            load_checkpoint(model, folder)
            for place in (0, 2):
                assert type(model[place].weight.to_local()) is FP8Weight
                assert values(model[place].weight.full_tensor()).equal(one[place].weight.dequantize())
            same(model(tokens(rank)), one(tokens(rank)))


@cases.works("save_checkpoint of a sharded model")
def _(rank: Rank) -> None:
    for scheme, n in (("row", 97), ("block", 192)):
        for stays in (False, True):
            one, folder = mlp(rank, n, scheme), rank.folder / f"{scheme} {stays}"
            model = mlp(rank, n, scheme)
            shard(model, (model[0], model[2]), reshard_after_forward=not stays)
            model(tokens(rank))
            assert bool(save_checkpoint(model, folder)) == (rank.number == 0)
            again = dense_mlp(rank, n, seed=7)
            load_checkpoint(again, folder)
            assert all(equal(again[place].weight, one[place].weight) for place in (0, 2))
            same(model(tokens(rank)), one(tokens(rank)))


@cases.refuses("saving where the first rank cannot write", " write")
def _(rank: Rank) -> None:
    folder = rank.folder / "a file"
    folder.touch()
    save_checkpoint(shard(mlp(rank), ()), folder)


@cases.refuses("resharding to a smaller mesh", "reshard_after_forward")
def _(rank: Rank) -> None:
    shards = rank.world // 2 if rank.world > 2 else rank.world
    model = mlp(rank)
    for layer in (model[0], model[2]):
        fully_shard(layer, reshard_after_forward=shards)
    fully_shard(model)
    model(tokens(rank))
    if shards == rank.world:  # that is reshard_after_forward=True
        raise ValueError("reshard_after_forward")


@pytest.mark.parametrize("case", cases.all(), ids=str)
def test_fsdp2(case: Case, world: int, backend: str) -> None:
    case.check(world, backend)
