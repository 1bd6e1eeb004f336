"""Tensor parallelism: parallelize_module with the styles of torch, before and after patching."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import Case, Cases, Rank
from small import bytes_of, dense_mlp, mesh, mlp, rows_of, tokens, values
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from fp8gemm import FP8GemmOptions, disable_fp8_gemm, enable_fp8_gemm, report, warmup
from fp8gemm.weights import FP8Weight

cases = Cases("Tensor parallelism")
PAIR = {"0": ColwiseParallel, "2": RowwiseParallel}
SCHEMES = (("row", 96), ("tensor", 96), ("block", 512))


def parallel(rank: Rank, model: nn.Module) -> nn.Module:
    return parallelize_module(model, mesh(rank), {name: style() for name, style in PAIR.items()})


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the order of sums; a rank's share of a sum is rounded to its dtype before it is added, and a rank that has
    a part of each token quantizes that part alone."""
    tolerance = 1e-4 if found.dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def check_halves(rank: Rank, model: nn.Module, one: nn.Module, x: torch.Tensor) -> None:
    """Each rank stores its share of the bytes and scales of the patched model ``one``; nothing is dequantized."""
    wide, narrow = (model[place].weight.to_local() for place in (0, 2))
    n = one[0].weight.shape[0]
    mine = rows_of(n, rank)
    assert (wide.shape, narrow.shape) == ((n // rank.world, 64), (64, n // rank.world))
    for layer, local in ((model[0], wide), (model[2], narrow)):
        assert layer.home is local._home
        data, scale = bytes_of(local)
        assert data.nbytes == n * 64 // rank.world
        assert scale.nbytes <= 4 * len(data)
    for local, layer, part in ((wide, one[0], (mine,)), (narrow, one[2], (slice(None), mine))):
        assert local.dequantize().equal(layer.weight.dequantize()[part])
        local.activity.dequantizations = 0
    close(model(x), one(x))
    for local in (wide, narrow):
        assert local.activity.dequantizations == 0
        assert sum(local.activity.kernels.values()) == 1


@cases.works("ColwiseParallel and RowwiseParallel of a patched model")
def _(rank: Rank) -> None:
    for scheme, n in SCHEMES:
        for dtype in (torch.float32, torch.bfloat16):
            model = parallel(rank, mlp(rank, n, scheme, seed=rank.number, dtype=dtype))  # rank 0's weights count
            check_halves(rank, model, mlp(rank, n, scheme, dtype=dtype), tokens(rank, dtype))


@cases.works("patching a model after parallelize_module")
def _(rank: Rank) -> None:
    for scheme, n in SCHEMES:
        for dtype in (torch.float32, torch.bfloat16):
            model = parallel(rank, dense_mlp(rank, n, dtype=dtype))
            enable_fp8_gemm(model, options=FP8GemmOptions(scheme=scheme))
            check_halves(rank, model, mlp(rank, n, scheme, dtype=dtype), tokens(rank, dtype))
            assert {row.name for row in report(model).converted} == {"0", "2"}


@cases.works("a model that quantizes at its first call, copies, casts and state dicts of a split one")
def _(rank: Rank) -> None:
    one, x = mlp(rank), tokens(rank)
    lazy = FP8GemmOptions(materialize_fp8_on_wrap=False)
    model = parallel(rank, enable_fp8_gemm(dense_mlp(rank), options=lazy))
    close(model(x), one(x))
    assert warmup(model, tokens=[1]) == 2
    for twin in (copy.deepcopy(model), parallel(rank, enable_fp8_gemm(dense_mlp(rank)).double()).float()):
        close(twin(x), one(x))
        assert type(twin[2].weight.to_local()) is FP8Weight
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for given in (state, one.state_dict(), dense_mlp(rank).state_dict()):
        for assign in (False, True):
            twin = parallel(rank, mlp(rank, seed=3))
            weights = {key: value for key, value in given.items() if "weight" in key}  # torch refuses dense biases
            twin.load_state_dict(weights, strict=False, assign=assign)
            for place in (0, 2):
                assert values(twin[place].weight.full_tensor()).equal(one[place].weight.dequantize())
                assert type(twin[place].weight.to_local()) is FP8Weight


@cases.works("uneven shards")
def _(rank: Rank) -> None:
    for scheme in ("row", "tensor"):
        for patch_first in (True, False):
            one = mlp(rank, 97, scheme)
            model = mlp(rank, 97, scheme) if patch_first else dense_mlp(rank, 97)
            whole_width = ColwiseParallel(use_local_output=False)  # a local output would not say how wide the whole is
            parallelize_module(model, mesh(rank), {"0": whole_width, "2": RowwiseParallel()})
            if not patch_first:
                enable_fp8_gemm(model, options=FP8GemmOptions(scheme=scheme))
            assert all(type(model[place].weight.to_local()) is FP8Weight for place in (0, 2))
            close(model(tokens(rank)), one(tokens(rank)))


@cases.works("shards that cut scale blocks get smaller blocks with the same scales")
def _(rank: Rank) -> None:
    for patch_first in (True, False):
        one, model = mlp(rank, 192, "block"), mlp(rank, 192, "block") if patch_first else dense_mlp(rank, 192)
        parallel(rank, model)
        if not patch_first:
            enable_fp8_gemm(model, options=FP8GemmOptions(scheme="block"))
        close(model(tokens(rank)), one(tokens(rank)))
        for place in (0, 2):
            assert type(model[place].weight.to_local()) is FP8Weight
            assert values(model[place].weight.full_tensor()).equal(one[place].weight.dequantize())


class Block(nn.Module):
    """A pre-norm block whose activations SequenceParallel splits along the sequence."""

    def __init__(self, rank: Rank) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(64, device=rank.device)
        self.up = nn.Linear(64, 128, device=rank.device)
        self.down = nn.Linear(128, 64, device=rank.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


@cases.works("SequenceParallel")
def _(rank: Rank) -> None:
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(3)).to(rank.device)
    part = x.chunk(rank.world, 1)[rank.number]
    for patch_first in (True, False):
        one, model = enable_fp8_gemm(Block(rank)), Block(rank)
        model = enable_fp8_gemm(model) if patch_first else model
        parallelize_module(model, mesh(rank), plan)
        model = model if patch_first else enable_fp8_gemm(model)
        assert type(model.up.weight.to_local()) is type(model.down.weight.to_local()) is FP8Weight
        close(model(part), one(x).chunk(rank.world, 1)[rank.number])


@cases.works("embeddings: a table split by rows or columns, and tied to a head")
def _(rank: Rank) -> None:
    ids = torch.arange(8, device=rank.device).view(2, 4) * 7 % 64

    def table() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"table": nn.Embedding(64, 32, device=rank.device)}).requires_grad_(False)

    for style in (RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())):
        options = FP8GemmOptions(embeddings=True)
        for patch_first in (True, False):
            one, model = enable_fp8_gemm(table(), options=options), table()
            model = enable_fp8_gemm(model, options=options) if patch_first else model
            parallelize_module(model, mesh(rank), {"table": style})
            model = model if patch_first else enable_fp8_gemm(model, options=options)
            assert type(model["table"].weight.to_local()) is FP8Weight
            assert model["table"](ids).equal(one["table"](ids))


@cases.works("gradients to the input of split layers")
def _(rank: Rank) -> None:
    one, model = mlp(rank), parallel(rank, mlp(rank))
    grads = []
    for net in (one, model):
        x = tokens(rank).requires_grad_()
        net(x).square().sum().backward()
        grads.append(x.grad)
    close(grads[1], grads[0])


@cases.works("FSDP2 on top")
def _(rank: Rank) -> None:
    split = 2 if rank.world > 2 else 1
    grid = init_device_mesh(rank.device.type, (rank.world // split, split), mesh_dim_names=("dp", "tp"))
    for scheme, n in (("row", 96), ("block", 512)):
        one, model = mlp(rank, n, scheme), mlp(rank, n, scheme)
        parallelize_module(model, grid["tp"], {name: style() for name, style in PAIR.items()})
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=grid["dp"])
        fully_shard(model, mesh=grid["dp"])
        local = model[0].weight.to_local()
        assert type(local) is FP8Weight
        assert local.scaled().data.nbytes == n * 64 // rank.world
        for _ in range(2):
            close(model(tokens(rank)), one(tokens(rank)))
        assert isinstance(model[0].weight, DTensor)


@cases.refuses("undo of a split model", "disable_fp8_gemm before sharding the model")
def _(rank: Rank) -> None:
    disable_fp8_gemm(parallel(rank, mlp(rank)))


@pytest.mark.parametrize("case", cases.all(), ids=str)
def test_tensor_parallel(case: Case, world: int, backend: str) -> None:
    case.check(world, backend)
