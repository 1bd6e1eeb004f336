"""Copies of modules with FP8 weights: by ``copy``, by pickle, in other processes and as replicas on other devices."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.multiprocessing
from owners import KINDS, Tied, in_fp8
from torch import nn

from fp8gemm import FP8Linear, report
from fp8gemm.weights import FP8Weight, own_weights


def saved(value: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: saved(module, weights_only=False),
}


@torch.no_grad()
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("scheme", "storage"), [("row", "keep"), ("block", "discard"), ("tensor", "cpu_offload")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_computes_the_same_and_shares_nothing(kind: str, scheme: str, storage: str, way: str, ran: bool) -> None:
    module, x = in_fp8(kind, scheme, storage)
    if ran:
        module(x)
    twin = WAYS[way](module)
    y = module(x)
    assert torch.equal(twin(x), y)
    assert [(name, type(p)) for name, p in twin.named_parameters()] == [
        (name, type(p)) for name, p in module.named_parameters()
    ]
    for parameter in twin.parameters():
        parameter.mul_(-2)
    assert torch.equal(module(x), y)
    assert not torch.equal(twin(x), y)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_written_to_and_still_due(way: str) -> None:
    """Pending writes are copied as well."""
    module, x = in_fp8("linear")
    module[0].weight[5:] = 1
    twin = WAYS[way](module)
    assert torch.equal(twin[0].weight[5:].float(), torch.ones(59, 64))
    assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("way", WAYS)
def test_ties_and_aliases_stay(way: str) -> None:
    module, x = in_fp8("tied")
    assert isinstance(module, Tied)
    module.alias = module.first.weight.t()  # a view of the weight, stored as another attribute
    twin = WAYS[way](module)
    assert twin.second.weight is twin.first.weight
    with torch.no_grad():
        twin.first.weight.zero_()
        assert torch.equal(twin.alias.float(), torch.zeros(64, 64))
        assert torch.equal(twin(x), twin.second.bias.expand(3, 64))
        assert not torch.equal(module.alias.float(), torch.zeros(64, 64))


def test_a_shallow_copy_shares_the_weight() -> None:
    module, x = in_fp8("linear")
    twin = copy.copy(module[0])
    assert twin.weight is module[0].weight
    assert torch.equal(twin(x), module[0](x))


@torch.no_grad()
@pytest.mark.parametrize("storage", ["keep", "discard"])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_saved_by_themselves_are_loaded_with_weights_only(kind: str, storage: str) -> None:
    module, x = in_fp8(kind, storage=storage)
    y = module(x)
    loaded = saved(dict(module.named_parameters(remove_duplicate=False)), weights_only=True)
    for name, weight in loaded.items():
        assert isinstance(weight, nn.Parameter)
        assert isinstance(weight, FP8Weight) == isinstance(module.get_parameter(name), FP8Weight)
    twin = in_fp8(kind, storage=storage)[0]
    twin.load_state_dict(loaded)
    assert torch.equal(twin(x), y)


def test_weights_only_loads_nothing_else_of_ours() -> None:
    layer = FP8Linear.from_linear(nn.Linear(16, 16))
    with pytest.raises(pickle.UnpicklingError, match="FP8Linear was not an allowed global"):
        saved(layer, weights_only=True)


# --- other processes -------------------------------------------------------------------------------------------------


FORKED = KINDS if "fork" in torch.multiprocessing.get_all_start_methods() else ()


def _answer(module: nn.Module, x: torch.Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        y = module(x)
    queue.put((y.tolist(), [parameter.is_shared() for parameter in module.parameters()]))


@torch.no_grad()
@pytest.mark.parametrize(("method", "kind"), [("spawn", "turned"), *(("fork", kind) for kind in FORKED)])
def test_a_shared_model_answers_in_another_process(method: str, kind: str) -> None:
    module, x = in_fp8(kind)
    y = module.share_memory()(x)
    assert all(parameter.is_shared() for parameter in module.parameters())
    context = torch.multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=_answer, args=(module, x, queue))
    process.start()
    found, shared = queue.get()
    process.join()
    assert torch.equal(torch.tensor(found), y)
    assert all(shared)


# --- replicas --------------------------------------------------------------------------------------------------------


def broadcast(tensors: list[Any], devices: list[int], detach: bool = False) -> list[list[torch.Tensor]]:
    """The result of torch's broadcast of many tensors: the tensors themselves, and flat copies on other devices."""
    if not tensors:
        return []
    flat = torch._utils._flatten_dense_tensors(tensors)
    return [list(tensors), *(list(torch._utils._unflatten_dense_tensors(flat, tensors)) for _ in devices[1:])]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_replicas_of_data_parallel_compute_the_same(kind: str, grad: bool) -> None:
    module, x = in_fp8(kind)
    import torch.nn.parallel.replicate

    room = sys.modules["torch.nn.parallel.replicate"]
    with torch.set_grad_enabled(grad), mock.patch.object(room, "_broadcast_coalesced_reshape", broadcast):
        y = module(x)
        first, second = room.replicate(module, [0, 1], detach=not grad)
        assert torch.equal(first(x), y)
        assert (second(x) - y).norm() <= 1e-6 * y.norm()  # a float32 product of the same values
    assert own_weights(second) == []
    assert torch.equal(module(x), y)
    assert len(report(module).converted) == len({id(p) for p in module.parameters() if isinstance(p, FP8Weight)})
