"""Saving a model whose parameters are split among ranks: one of them gets the whole tensors, and writes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import CheckpointError
from ..weights.shares import is_split, whole

Made = TypeVar("Made")


def split_tensors(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Every parameter and buffer of ``model`` that is a DTensor: where it is stored, under which name, and itself."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _reshard(model)
    stores: list[dict[str, Any]] = [store for m in model.modules() for store in (m._parameters, m._buffers)]
    return [(store, name, tensor) for store in stores for name, tensor in store.items() if is_split(tensor)]


def _reshard(model: nn.Module) -> None:
    """Lets FSDP2 put its shards in place of weights that it keeps gathered, which look as if they were not split."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def on_one_rank(model: nn.Module, save: Callable[[], list[Made]]) -> list[Made]:
    """Calls ``save`` where ``model`` has whole tensors: on the first rank, while the others only send theirs.

    All ranks have to call it. The first one holds the whole model in CPU memory, with FP8 weights as bytes and scales.

    Raises:
        CheckpointError: on the other ranks, where ``save`` raised on the first.
    """
    found = split_tensors(model)
    if not found:
        return save()
    meshes = {id(tensor.device_mesh): tensor.device_mesh for _, _, tensor in found}
    writes = all(not any(mesh.get_coordinate()) for mesh in meshes.values())
    gathered: dict[int, Any] = {}
    with torch.no_grad():
        for _, _, tensor in found:
            if id(tensor) not in gathered:
                full = whole(tensor).clone()
                gathered[id(tensor)] = _like(tensor, full.to("cpu")) if writes else None
    error: BaseException | None = None
    made: list[Made] = []
    if writes:
        try:
            with _in_place([(store, name, gathered[id(tensor)]) for store, name, tensor in found]):
                made = save()
        except BaseException as caught:  # the others wait to be told
            error = caught
    if not _all_well(found[0][2], error is None) and error is None:
        raise CheckpointError("the rank that writes the checkpoint could not save it; its own error says why")
    if error is not None:
        raise error
    return made


def _like(tensor: Any, full: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(full, requires_grad=False) if isinstance(tensor, nn.Parameter) else full


@contextlib.contextmanager
def _in_place(tensors: list[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Puts these tensors where they belong in a model, and back what was there."""
    former = [(store, name, store[name]) for store, name, _ in tensors]
    try:
        for store, name, tensor in tensors:
            store[name] = tensor
        yield
    finally:
        for store, name, tensor in former:
            store[name] = tensor


def _all_well(tensor: Any, well: bool) -> bool:
    """Whether ``well`` is true on all ranks of the DTensor's mesh."""
    mesh = tensor.device_mesh
    flag = torch.tensor(int(well), dtype=torch.int32, device=mesh.device_type)
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=mesh.get_group(dim))
    return bool(flag)
