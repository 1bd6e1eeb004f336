"""Collectives on FP8 weights: those that only move data send bytes and scales in one message, others use values.

First the ranks exchange what they hold, so that all send bytes or all send values. ``send`` and ``recv`` exchange
nothing beforehand: both ranks must pass FP8 weights with the same options.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from ..errors import UnsupportedError
from ..numerics import dequantize
from ..scaled import ScaledTensor
from .copies import watched_by_a_mode
from .dispatch import OPERATIONS, implements
from .geometry import Layout
from .message import Message, values_to_send
from .sharding import coarsened, whole_scheme
from .stored import Stored
from .weight import FP8Weight


def _agree(group: Any, key: FP8Weight, message: Message | None, others: Iterable[Any] = ()) -> bool:
    """Whether all ranks of ``group`` can send bytes; a collective call, so that they all get the same answer.

    Raises:
        UnsupportedError: the weights differ in shape or dtype; raised on every rank.
    """
    if torch.compiler.is_compiling() or watched_by_a_mode() or key.is_meta:
        return False
    messages = [message, *(Message.of(other) for other in others)]
    facts = 0 if message is None else message.facts
    able = all(one is not None and one.ready and one.facts == facts for one in messages)
    outside = zlib.crc32(repr((tuple(key.shape), key.dtype)).encode())
    mine = torch.tensor([outside, facts, int(able)], dtype=torch.int64, device=key.device)
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    group.allgather([gathered], [mine]).wait()
    answers = [tuple(answer) for answer in torch.stack(gathered).tolist()]
    if {answer[0] for answer in answers} != {outside}:
        raise UnsupportedError(
            f"a collective needs weights of the same shape and dtype on all ranks; rank {group.rank()} has "
            f"{tuple(key.shape)} in {key.dtype}, another rank has something else; patch the model alike on all"
        )
    return all(answer[1:] == (facts, 1) for answer in answers)


class _Finishing(torch.distributed.Work):
    """A handle whose ``wait`` also gives the received data to the weight."""

    waited_for: set[_Finishing] = set()  # noqa: RUF012  # C++ holds a Work without its Python part

    def __init__(self, work: Any, finish: Callable[[], Any]) -> None:
        super().__init__()
        self.work, self.finish = work, finish
        self.waited_for.add(self)

    def wait(self, timeout: Any = None) -> bool:
        self.work.wait() if timeout is None else self.work.wait(timeout)
        if self in self.waited_for:
            self.waited_for.discard(self)
            self.finish()
        return True

    def is_completed(self) -> bool:
        return bool(self.work.is_completed())


def finishing(work: Any, finish: Callable[[], Any]) -> Any:
    """The handle of a c10d operation; ``finish`` runs when it is waited for."""
    return _Finishing(torch.distributed.Work.unbox(work), finish).boxed()


def _started(func: Any, args: dict[str, Any], finish: Callable[[], None]) -> Any:
    """Runs a c10d operation on plain tensors; ``finish`` follows when it is done."""
    result = func(**args)
    at_once = args.get("async_op") is False

    def finished(leaf: Any) -> Any:
        if not isinstance(leaf, torch.ScriptObject):
            return leaf
        if not at_once:
            return finishing(leaf, finish)
        torch.distributed.Work.unbox(leaf).wait()
        return leaf

    result = tree_map(finished, result)
    if at_once:
        finish()
    return result


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, including defaults."""
    names = [argument.name for argument in func._schema.arguments]
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _group(named: dict[str, Any]) -> Any:
    return torch.distributed.ProcessGroup.unbox(named["process_group"])


def _broadcast(func: Any, named: dict[str, Any]) -> Any:
    (key,), group = named["tensors"], _group(named)
    message = Message.of(key)
    if not _agree(group, key, message) or message is None:
        return NotImplemented
    root = group.rank() == named["root_rank"]
    buffer = message.write() if root else message.room()
    _, work = _started(func, {**named, "tensors": [buffer]}, lambda: None if root else message.deliver(buffer, key))
    return [key], work


def _send(func: Any, named: dict[str, Any]) -> Any:
    (key,) = named["tensors"]
    message = Message.of(key)
    return NotImplemented if message is None else _started(func, {**named, "tensors": [message.write()]}, lambda: None)


def _receive(func: Any, named: dict[str, Any]) -> Any:
    (key,) = named["tensors"]
    message = Message.of(key)
    if message is None:
        return NotImplemented
    buffer = message.room()
    return _started(func, {**named, "tensors": [buffer]}, lambda: message.deliver(buffer, key))


def _all_gather(func: Any, named: dict[str, Any]) -> Any:
    """Also handles ``gather_``, whose output lists are empty except on the root."""
    lists = "output_tensors"
    (key,) = named["input_tensors"]
    message = Message.of(key)
    if not _agree(_group(named), key, message) or message is None:
        return NotImplemented
    targets = named[lists][0] if named[lists] else []
    buffers = [message.room() for _ in targets]

    def finish() -> None:
        for buffer, target in zip(buffers, targets, strict=True):
            message.deliver(buffer, target)

    result = _started(
        func, {**named, lists: [buffers] if named[lists] else [], "input_tensors": [message.write()]}, finish
    )
    return (named[lists], result[1]) if isinstance(result, (tuple, list)) else result


def _scatter(func: Any, named: dict[str, Any]) -> Any:
    (key,), lists = named["output_tensors"], named["input_tensors"]
    message = Message.of(key)
    given = lists[0] if lists else []
    if not _agree(_group(named), key, message, given) or message is None:
        return NotImplemented
    buffer = message.room()
    parts = [one.write() for tensor in given if (one := Message.of(tensor)) is not None]
    _, work = _started(
        func,
        {**named, "output_tensors": [buffer], "input_tensors": [parts] if lists else []},
        lambda: message.deliver(buffer, key),
    )
    return [key], work


def _all_gather_single(func: Any, named: dict[str, Any]) -> Any:
    """All-gathers into one tensor, concatenated along the first dimension."""
    key, output, group = named["input_tensor"], named["output_tensor"], _group(named)
    message = Message.of(key)
    if not _agree(group, key, message) or message is None or output.numel() != key.numel() * group.size():
        return NotImplemented
    buffer = message.room(group.size())
    first = key.shape[0]

    def finish() -> None:
        weight = isinstance(output, FP8Weight)
        rows = output if weight else output.view(-1, *key.shape[1:])
        for rank, part in enumerate(buffer.chunk(group.size())):
            message.deliver(part, rows.narrow(0, rank * first, first))

    _, work = _started(func, {**named, "output_tensor": buffer, "input_tensor": message.write()}, finish)
    return output, work


_BY_BYTES: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "broadcast_": _broadcast,
    "send": _send,
    "recv_": _receive,
    "recv_any_source_": _receive,
    "allgather_": _all_gather,
    "gather_": _all_gather,
    "scatter_": _scatter,
    "_allgather_base_": _all_gather_single,
}
_READ_ONLY = ("input", "inputs", "input_list", "input_tensor", "input_tensors")


def _by_values(func: Any, named: dict[str, Any]) -> Any:
    """Runs on dense values; what is received is written to the weights, and their next product quantizes it."""
    dense: dict[int, tuple[FP8Weight, torch.Tensor]] = {}

    def values(weight: FP8Weight) -> torch.Tensor:
        if id(weight) not in dense:
            dense[id(weight)] = (weight, values_to_send(weight))
        return dense[id(weight)][1]

    plain = {name: tree_map_only(FP8Weight, values, value) for name, value in named.items()}
    read = {id(t) for name in _READ_ONLY for t in tree_flatten(named.get(name))[0] if isinstance(t, FP8Weight)}
    operation = func._schema.name.removeprefix("c10d::")
    group = _group(named)
    at_root = "root_rank" not in named or named["root_rank"] == group.rank()
    keeps = operation == "send" or (operation == "reduce_" and not at_root) or (operation == "broadcast_" and at_root)

    def finish() -> None:
        for weight, value in dense.values():
            if not keeps and id(weight) not in read:
                weight.copy_(value)
                weight._home.owned = True

    result = _started(func, plain, finish)
    back = {id(value): weight for weight, value in dense.values()}
    return tree_map_only(torch.Tensor, lambda t: back.get(id(t), t), result)


def _operation(name: str) -> Callable[..., Any]:
    func = getattr(torch.ops.c10d, name).default
    by_bytes = _BY_BYTES.get(name)

    def run(*args: Any, **kwargs: Any) -> Any:
        named = _arguments(func, args, kwargs)
        result = NotImplemented if by_bytes is None else by_bytes(func, named)
        return _by_values(func, named) if result is NotImplemented else result

    return run


for _name in (
    *_BY_BYTES,
    "allreduce_",
    "allreduce_coalesced_",
    "reduce_",
    "reduce_scatter_",
    "_reduce_scatter_base_",
    "reduce_scatter_tensor_coalesced_",
    "allgather_coalesced_",
    "allgather_into_tensor_coalesced_",
    "alltoall_",
    "alltoall_base_",
):
    if hasattr(torch.ops.c10d, _name):
        OPERATIONS[getattr(torch.ops.c10d, _name).default] = _operation(_name)


functional = torch.ops._c10d_functional


@implements(OPERATIONS, functional.all_gather_into_tensor.default)
def _gathered(weight: Any, group_size: int, group_name: Any) -> Any:
    """The ranks' weights concatenated along the first dimension, in FP8 where the scale blocks allow that."""
    group, message = _resolved(group_name), Message.of(weight)
    if hasattr(functional, "_wrap_tensor_autograd"):  # torch 2.13, imported only when needed
        OPERATIONS.setdefault(functional._wrap_tensor_autograd.default, _there_already)
    if not _agree(group, weight, message) or message is None:
        return NotImplemented
    buffer = functional.all_gather_into_tensor(message.write(), group_size, group_name)
    parts = [message.read(part) for part in functional.wait_tensor(buffer).chunk(group_size)]
    home, scheme = weight._home, whole_scheme(weight._home.scheme)
    if scheme.weight.cols != message.grid.cols:  # parts of rows, which torch puts beside each other itself
        scheme = home.scheme
    rows, stack = message.grid.rows, len(message.shape) == 3
    fits = stack or (message.shape[-2] % rows == 0 if rows else all(p.scale.equal(parts[0].scale) for p in parts))
    if not fits or (message.part.flipped and not stack):
        ours = [dequantize(part, weight.dtype) for part in parts]
        return torch.cat([w.transpose(-1, -2) if message.part.flipped else w for w in ours])
    data = torch.cat([part.data.view(torch.uint8) for part in parts]).view(message.fp8)
    scale = torch.cat([part.scale for part in parts]) if stack or rows else parts[0].scale
    scaled = ScaledTensor(data, scale, message.grid)
    scaled = scaled if stack else coarsened(scaled, scheme)
    twin = home.copy(Stored(scaled), Layout(tuple(scaled.shape), message.part.flipped))
    twin.scheme = scheme
    return FP8Weight(twin, weight.dtype)


def _there_already(weight: FP8Weight) -> FP8Weight:
    """The weight itself, which is already complete, in place of an asynchronous tensor."""
    return _waited_for(weight).like()  # type: ignore[no-any-return]


@implements(OPERATIONS, functional.wait_tensor.default)
def _waited_for(weight: FP8Weight) -> FP8Weight:
    if weight._home.dense is not None:  # functional collectives write here
        functional.wait_tensor(weight._home.dense)
    return weight


def _resolved(group: Any) -> Any:
    """The process group, which functional collectives pass by name."""
    if not isinstance(group, str):
        return group
    return torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]
