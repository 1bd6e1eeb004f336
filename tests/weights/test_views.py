"""Writes through views, made in each of torch's ways, reach an FP8 weight as they would reach a dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twins import SCHEMES, K, N, check_write, exact, matrix, near, put, random_like

from fp8gemm import FP8GemmOptions, UnsupportedError, enable_fp8_gemm
from fp8gemm.weights import FP8Weight, convert

View = Callable[[torch.Tensor], torch.Tensor]
MATRIX_VIEWS: dict[str, View] = {
    "all": lambda w: w,
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "rows": lambda w: w[3:11],
    "whole blocks of rows": lambda w: w[8:24],
    "columns": lambda w: w[:, 16:37],
    "one row": lambda w: w.select(0, 5),
    "one column": lambda w: w[:, 7],
    "one element": lambda w: w[9, 4],
    "every other row": lambda w: w[::2],
    "flat": lambda w: w.view(-1)[100:333],
    "transposed": lambda w: w.t(),
    "transposed columns": lambda w: w.t()[:, 8:16],
    "diagonal": lambda w: w.diagonal(),
    "as_strided": lambda w: w.as_strided((4, 6), (96, 2), 50),
    "chunk": lambda w: w.chunk(3)[1],
    "unbind": lambda w: w.unbind(1)[2],
    "narrow": lambda w: w.narrow(0, 4, 9),
    "more dimensions": lambda w: w.view(5, 8, 48)[2],
    "four dimensions": lambda w: w[:, :, None, None].squeeze(),
    "unfold": lambda w: w.unfold(0, 4, 4)[1],
    "view of a view": lambda w: w[8:32].t()[3:20].t()[2:9],
}
STACK_VIEWS: dict[str, View] = {
    "all": lambda w: w,
    "expert": lambda w: w[1],
    "experts": lambda w: w.data[1:3],
    "rows of one expert": lambda w: w[2, 4:13],
    "columns of all": lambda w: w[:, :, 5:20],
    "rows of all": lambda w: w[:, 8:16],
    "transposed": lambda w: w.transpose(1, 2),
    "flat": lambda w: w.view(-1)[1900:4000],
    "all rows": lambda w: w.flatten(0, 1)[30:55],
    "unbind": lambda w: w.unbind(0)[2],
    "diagonals": lambda w: w.diagonal(dim1=1, dim2=2),
}


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "zero_": lambda w: w.zero_(),
    "mul_": lambda w: w.mul_(-2.5),
    "copy_": lambda w: w.copy_(random_like(w)),
    "mask": lambda w: put(w, random_like(w) > 0, 0.25),
    "out": lambda w: torch.add(random_like(w), 0.5, out=w),
    "foreach": lambda w: torch._foreach_add_([w], [random_like(w)]),
}


def stack(scheme: str, storage: str, *, turned: bool) -> nn.Module:
    owner = nn.Module()
    shape = (3, K, N) if turned else (3, N, K)
    owner.weight = nn.Parameter(torch.randn(shape, dtype=torch.float32).bfloat16() * 0.1)
    options = FP8GemmOptions(scheme=SCHEMES[scheme], fp16_weight_storage=storage)  # type: ignore[arg-type]
    convert(owner, "weight", options, turned=turned)
    return owner


@pytest.mark.parametrize("storage", ["discard", "keep"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_writes_through_views(scheme: str, storage: str) -> None:
    x = torch.randn(3, K, dtype=torch.float32).bfloat16()
    # covers all pairs of view and write, but not all combinations
    turn = list(SCHEMES).index(scheme) + (storage == "keep")
    for number, view in enumerate(MATRIX_VIEWS.values(), start=turn):
        for write in (list(WRITES.values())[(number + step) % len(WRITES)] for step in (0, 3)):
            layer = matrix(scheme, storage)
            for _ in range(2):
                layer(x)  # binds the call
            check_write(layer.weight, lambda w, write=write, view=view: write(view(w)))
            y = layer(x)
            assert isinstance(layer.weight, FP8Weight)
            near(
                y, F.linear(x, layer.weight.dequantize(), layer.bias), 0.01 if layer.scheme.activation is None else 0.05
            )


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("storage", ["discard", "keep"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_writes_to_stacks(scheme: str, storage: str, turned: bool) -> None:
    x = torch.randn(3, 2, K, dtype=torch.float32).bfloat16()
    for view in STACK_VIEWS.values():
        for write in (WRITES["mul_"], WRITES["mask"], WRITES["out"]):
            weight = stack(scheme, storage, turned=turned).weight
            check_write(weight, lambda w, write=write, view=view: write(view(w)))
            rights = [w if turned else w.transpose(1, 2) for w in (weight, weight.dequantize())]
            near(torch.bmm(x, rights[0]), torch.bmm(x, rights[1]))


@pytest.mark.parametrize("write", WRITES)
def test_pieces_that_were_copied_stay_as_they_were(write: str) -> None:
    """A copy is not a view: writes to one do not change the other."""
    copies: list[Callable[[torch.Tensor], torch.Tensor]] = [
        *(torch.clone, lambda w: w.float(), lambda w: w.to(torch.float16), lambda w: w[8:16].clone()),
        *(lambda w: w.t().contiguous(), lambda w: w.to(torch.bfloat16, copy=True), lambda w: w * 1),
        *(lambda w: w[torch.tensor([1, 2], dtype=torch.int64)], lambda w: w.to(torch.float8_e4m3fn, copy=True)),
    ]
    for storage in ("discard", "keep"):
        for copy in copies:
            weight = matrix("row", storage).weight
            made = copy(weight)
            start = _values(made)
            WRITES[write](weight)
            assert _values(made).equal(start)
            changed = exact(weight)
            WRITES[write](made)
            assert exact(weight).equal(changed)
            assert not _values(made).equal(start)


def _values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, FP8Weight) else tensor.clone()


def test_chosen_experts_are_those_of_the_moment() -> None:
    weight = stack("row", "discard", turned=False).weight
    ids = torch.tensor([2, -3], dtype=torch.int64)
    chosen, wanted = weight[ids], weight.dequantize()[ids]
    weight.zero_()
    ids.zero_()
    assert chosen.dequantize().equal(wanted)
    chosen.zero_()
    assert weight.dequantize().count_nonzero() == 0


# --- what is refused, and what is read ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda w: w.set_(torch.ones(3, dtype=w.dtype)),
        lambda w: w.set_(torch.ones(3, dtype=w.dtype).untyped_storage()),
        lambda w: w.resize_(2, 2),
        lambda w: w.resize_as_(torch.ones(2, dtype=w.dtype)),
        lambda w: w.t_(),
        lambda w: w[3].unsqueeze_(0),
        lambda w: w.as_strided_((2, 2), (1, 1)),
        lambda w: w.view(torch.uint8),
        lambda w: w.apply_(lambda value: value + 1),
        lambda w: w.map_(torch.ones(N, K, dtype=w.dtype), lambda a, b: b),
        lambda w: torch.from_dlpack(w),
        lambda w: torch.cat([w.dequantize(), w.dequantize()], out=w),
        lambda w: w.requires_grad_(),
        lambda w: setattr(w, "requires_grad", True),
    ],
)
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_refused_in_words(ask: Callable[[torch.Tensor], Any]) -> None:
    weight = matrix("row").weight
    before = weight.dequantize()
    with pytest.raises(UnsupportedError, match="an FP8 weight"):
        ask(weight)
    assert weight.dequantize().equal(before)


def test_reading_as_numbers() -> None:
    weight = matrix("row", dtype=torch.float32).weight
    values = weight.dequantize()
    assert weight.tolist() == values.tolist()
    assert weight.view(torch.float32).dequantize().equal(values)
    array = weight.numpy()
    assert (array == values.numpy()).all()
    with pytest.raises(ValueError, match="read-only"):  # writes to the array would not reach the weight
        array[0] = 1


IN_INFERENCE: dict[str, Callable[[FP8Weight, FP8Weight], Any]] = {
    "w.T": lambda w, stack: X @ w.T,
    "rows": lambda w, stack: F.linear(X, w[8:16]),
    "chunk": lambda w, stack: torch.cat([F.linear(X, part) for part in w.chunk(3)], dim=-1),
    "experts": lambda w, stack: torch.stack([F.linear(X[:, :32].float(), expert) for expert in stack]),
    "cast": lambda w, stack: F.linear(X.float(), w.float()),
    "to": lambda w, stack: F.linear(X.half(), w.to(torch.float16)),
    "grouped": lambda w, stack: torch._grouped_mm(X[:, :32], stack.bfloat16().transpose(-2, -1), offs=ENDS),
    "matmul": lambda w, stack: torch.matmul(X[:, None], w.t()),
    "einsum": lambda w, stack: torch.einsum("bk,nk->bn", X, w),
    "reshape": lambda w, stack: F.linear(X, w.reshape(4, -1, K)[2]),
    "4-D": lambda w, stack: F.linear(X, w[:, :, None, None].squeeze()),
    "flatten": lambda w, stack: w.flatten()[5:9] + 0,
    "contiguous": lambda w, stack: w.t().contiguous() + 0,
    "type_as": lambda w, stack: F.linear(X.float(), w.type_as(X.float())),
    "addmm": lambda w, stack: torch.addmm(X[:, :1], X, w.t()),
}


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("name", IN_INFERENCE)
def test_inference_mode_gives_what_no_grad_gives(name: str, made_inside: bool) -> None:
    """Inference mode does not decompose some operations, and counts writes to views of normal tensors."""
    with torch.inference_mode(made_inside):
        torch.manual_seed(0)
        w, stack = matrix("row").weight, enable_fp8_gemm(Stack()).up_proj
    expression = IN_INFERENCE[name]
    with torch.inference_mode():
        found = expression(w, stack)
        before = w.activity.dequantizations
        expression(w, stack)
        counted = w.activity.dequantizations - before
    with torch.no_grad():
        before = w.activity.dequantizations
        expected = expression(w, stack)
        assert counted == w.activity.dequantizations - before == (name == "flatten")
    assert found.dtype == expected.dtype
    assert found.equal(expected)


X = torch.randn(6, K, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(3))
ENDS = torch.tensor([1, 3, 4, 6], dtype=torch.int32)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(4, 24, 32))
