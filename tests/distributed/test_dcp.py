"""torch.distributed.checkpoint: what one number of ranks saves, another loads, bytes and scales alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Case, Cases, Rank
from small import bytes_of, mlp, tokens, values
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fp8gemm.weights import FP8Weight

cases = Cases("torch.distributed.checkpoint")
SHAPES = (("row", 96), ("row", 97), ("tensor", 97), ("block", 256), ("block", 192))
Shard = Callable[[nn.Module, DeviceMesh], nn.Module]


def plain(model: nn.Module, place: DeviceMesh) -> nn.Module:
    return model


def fsdp(model: nn.Module, place: DeviceMesh) -> nn.Module:
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=place)
    return model


def parallel(model: nn.Module, place: DeviceMesh) -> nn.Module:
    return parallelize_module(model, place, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def group(rank: Rank, size: int) -> DeviceMesh | None:
    """A mesh of the first ``size`` ranks; None on the others."""
    found = dist.new_group(list(range(size)))
    return DeviceMesh.from_group(found, rank.device.type) if rank.number < size else None


def holds(model: nn.Module, saved: nn.Module) -> None:
    """Checks that a model, split or not, has the bytes and scales of another."""
    for place in (0, 2):
        weight, expected = model[place].weight, saved[place].weight
        found = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        assert values(found).equal(expected.dequantize())
        state = model[place].state_dict()
        assert isinstance(getattr(weight, "_local_tensor", weight), FP8Weight)
        scale = state["weight_scale"]
        scale = scale.full_tensor() if hasattr(scale, "full_tensor") else scale
        assert scale.equal(bytes_of(expected)[1])


def save(rank: Rank, size: int, shard: Shard, scheme: str, n: int, name: str) -> None:
    place = group(rank, size)
    if place is not None:
        model = shard(mlp(rank, n, scheme), place)
        dcp.save(model.state_dict(), checkpoint_id=rank.folder / name, process_group=place.get_group())
    dist.barrier()


def load(rank: Rank, size: int, shard: Shard, scheme: str, n: int, name: str) -> None:
    """Loads what ``save`` wrote and compares bytes and scales with those of the model that was saved."""
    place = group(rank, size)
    if place is not None:
        model, saved = shard(mlp(rank, n, scheme, seed=1 + rank.number), place), mlp(rank, n, scheme)
        state = model.state_dict()
        dcp.load(state, checkpoint_id=rank.folder / name, process_group=place.get_group())
        model.load_state_dict(state)
        holds(model, saved)
        torch.testing.assert_close(model(tokens(rank)), saved(tokens(rank)))
    dist.barrier()


def crossed(rank: Rank, savers: Any, loaders: Any) -> None:
    for scheme, n in SHAPES:
        for size, shard in savers:
            name = f"{scheme} {n} {size} {shard.__name__}"
            save(rank, size, shard, scheme, n, name)
            for other, how in loaders:
                load(rank, other, how, scheme, n, name)


@cases.works("replicated models")
def _(rank: Rank) -> None:
    crossed(rank, [(rank.world, plain)], [(rank.world, plain), (1, plain)])


@cases.works("saved by two ranks, loaded by one and by all, under FSDP2")
def _(rank: Rank) -> None:
    crossed(rank, [(2, fsdp)], [(1, plain), (1, fsdp), (rank.world, fsdp)])


@cases.works("saved by one rank, loaded by all into FSDP2")
def _(rank: Rank) -> None:
    crossed(rank, [(1, plain)], [(rank.world, fsdp)])


@cases.works("saved under FSDP2, loaded into tensor parallelism, and the reverse")
def _(rank: Rank) -> None:
    for scheme, n in (("row", 96), ("tensor", 96), ("block", 512)):
        for first, second in ((fsdp, parallel), (parallel, fsdp), (parallel, plain)):
            size = 1 if second is plain else rank.world
            save(rank, 2, first, scheme, n, f"{scheme} {first.__name__} {second.__name__}")
            load(rank, size, second, scheme, n, f"{scheme} {first.__name__} {second.__name__}")


@cases.works("full state dicts of sharded models (StateDictOptions)")
def _(rank: Rank) -> None:
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    given = StateDictOptions(full_state_dict=True)
    for scheme, n in SHAPES:
        saved = mlp(rank, n, scheme)
        state = get_model_state_dict(fsdp(mlp(rank, n, scheme), group(rank, rank.world)), options=full)
        if rank.number == 0:
            torch.save(state, rank.folder / "full.pt")
            one = mlp(rank, n, scheme, seed=3)
            one.load_state_dict(torch.load(rank.folder / "full.pt", weights_only=True))
            holds(one, saved)
        model = fsdp(mlp(rank, n, scheme, seed=4), group(rank, rank.world))
        set_model_state_dict(model, saved.state_dict(), options=given)
        holds(model, saved)


@cases.works("keys and files are those of an unsplit model")
def _(rank: Rank) -> None:
    for shard in (fsdp, parallel):
        for scheme, n in (("row", 96), ("tensor", 96), ("block", 512)):
            one, name = mlp(rank, n, scheme), f"{scheme} {shard.__name__}"
            assert set(shard(mlp(rank, n, scheme), group(rank, rank.world)).state_dict()) == set(one.state_dict())
            save(rank, rank.world, shard, scheme, n, name)
            if rank.number == 0:
                files = dcp.FileSystemReader(rank.folder / name).read_metadata().state_dict_metadata
                expected = {key: (value.shape, value.dtype) for key, value in one.state_dict().items()}
                assert {key: (found.size, found.properties.dtype) for key, found in files.items()} == expected


@cases.works("state dicts on the CPU (StateDictOptions)")
def _(rank: Rank) -> None:
    for shard in (fsdp, parallel):
        model = shard(mlp(rank, 512, "block"), group(rank, rank.world))
        away = get_model_state_dict(model, options=StateDictOptions(cpu_offload=True))
        dcp.save(away, checkpoint_id=rank.folder / shard.__name__)
        again = shard(mlp(rank, 512, "block", seed=3), group(rank, rank.world))
        state = get_model_state_dict(again)
        dcp.load(state, checkpoint_id=rank.folder / shard.__name__)
        set_model_state_dict(again, state)
        holds(again, mlp(rank, 512, "block"))


@cases.refuses("async_save, whose copies torch makes by storage", "invalid python storage")
def _(rank: Rank) -> None:
    both = dist.new_group(backend="gloo")
    dcp.async_save(mlp(rank).state_dict(), checkpoint_id=rank.folder / "async", process_group=both).result()


@cases.refuses("saving parts of different weights", "0.weight: the parts of this weight do not come from one weight")
def _(rank: Rank) -> None:
    model = fsdp(mlp(rank, 97, "tensor", seed=rank.number), group(rank, rank.world))
    dcp.save(model.state_dict(), checkpoint_id=rank.folder / "parts")


@pytest.mark.parametrize("case", cases.all(), ids=str)
def test_dcp(case: Case, world: int, backend: str) -> None:
    case.check(world, backend)
