"""Writes through views, made in each of torch's ways, and products with them: as a dense weight has it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp8gemm import FP8GemmOptions, Granularity, Scheme, UnsupportedError
from fp8gemm.numerics import block_amax, dequantize, expand_scale
from fp8gemm.weights import FP8Linear, FP8Weight, convert

N, K = 40, 48
TILES = Scheme(weight=Granularity(8, 16), activation=None)
GROUPS = Scheme(weight=Granularity(1, 16), activation=None)
SCHEMES = {"row": "weight_only", "tiles": TILES, "groups": GROUPS, "block": "block", "tensor": "tensor"}

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


def _set(w: torch.Tensor, where: Any, value: Any) -> None:
    w[where] = value


def _random(w: torch.Tensor) -> torch.Tensor:
    return torch.randn(w.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float32).to(w.dtype) * 0.3


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "zero_": lambda w: w.zero_(),
    "mul_": lambda w: w.mul_(-2.5),
    "copy_": lambda w: w.copy_(_random(w)),
    "mask": lambda w: _set(w, _random(w) > 0, 0.25),
    "out": lambda w: torch.add(_random(w), 0.5, out=w),
    "foreach": lambda w: torch._foreach_add_([w], [_random(w)]),
}


def matrix(scheme: str, storage: str = "discard", dtype: torch.dtype = torch.bfloat16) -> FP8Linear:
    options = FP8GemmOptions(scheme=SCHEMES[scheme], fp16_weight_storage=storage)  # type: ignore[arg-type]
    return FP8Linear.convert(nn.Linear(K, N, dtype=dtype), options)


def stack(scheme: str, storage: str, *, turned: bool) -> nn.Module:
    owner = nn.Module()
    shape = (3, K, N) if turned else (3, N, K)
    owner.weight = nn.Parameter(torch.randn(shape, dtype=torch.float32).bfloat16() * 0.1)
    options = FP8GemmOptions(scheme=SCHEMES[scheme], fp16_weight_storage=storage)  # type: ignore[arg-type]
    convert(owner, "weight", options, turned=turned)
    return owner


def exact(weight: FP8Weight) -> torch.Tensor:
    """The values that a write changes, in memory of their own."""
    original = weight._home.original
    return weight.dequantize() if original is None else original.detach().clone()


def check_write(weight: FP8Weight, write: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    """Writes to a weight and to its dense twin, and compares values, bytes and blocks that nothing touched.

    A value is rounded to half a unit of E4M3's three bits, 2**-4 of it, and to half of its smallest number, 2**-10
    times the scale. Returns the twin.
    """
    before, twin = weight.scaled(), exact(weight)
    turned = weight._home.layout.turned
    was = twin.clone()
    torch.manual_seed(5)
    write(twin)
    torch.manual_seed(5)
    write(weight)
    assert exact(weight).equal(twin)
    after = weight.scaled()
    changed = (was != twin).transpose(-1, -2) if turned else was != twin
    grid = after.granularity
    untouched = block_amax(changed.to(torch.float32), grid) == 0
    assert after.scale[untouched].equal(before.scale[untouched])
    same = expand_scale(untouched.to(torch.float32), grid, after.shape).expand(after.shape) > 0
    assert after.data.view(torch.uint8)[same].equal(before.data.view(torch.uint8)[same])
    found = dequantize(after).transpose(-1, -2) if turned else dequantize(after)
    scale = expand_scale(after.scale, grid, after.shape).expand(after.shape)
    scale = scale.transpose(-1, -2) if turned else scale
    assert ((found - twin).abs() <= twin.abs() * 2**-4 * 1.001 + scale * 2**-10).all()
    return twin


def near(y: torch.Tensor, wanted: torch.Tensor, tolerance: float = 0.05) -> None:
    """FP8 products are off by up to 4 % of their norm where activations are rounded, and by bfloat16's where not."""
    error = (y.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-6)
    assert error < tolerance


@pytest.mark.parametrize("storage", ["discard", "keep"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_writes_through_views(scheme: str, storage: str) -> None:
    x = torch.randn(3, K, dtype=torch.float32).bfloat16()
    turn = list(SCHEMES).index(scheme) + (storage == "keep")  # all pairs of a view and a write come up, not all at once
    for number, view in enumerate(MATRIX_VIEWS.values(), start=turn):
        for write in (list(WRITES.values())[(number + step) % len(WRITES)] for step in (0, 3)):
            layer = matrix(scheme, storage)
            for _ in range(2):
                layer(x)  # bound
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
    """A copy is not a view: neither sees what is written to the other."""
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


# --- everyday writes ----------------------------------------------------------------------------------------------


def _swap(layer: nn.Linear, values: torch.Tensor) -> None:
    torch.utils.swap_tensors(layer.weight, nn.Parameter(values.clone(), requires_grad=False))


def _register(layer: nn.Linear, values: torch.Tensor) -> None:
    del layer.weight
    layer.register_parameter("weight", nn.Parameter(values.clone(), requires_grad=False))


def _flat(layer: nn.Linear, values: torch.Tensor) -> None:
    """The second parameter lies behind the first in one flat tensor."""
    first = nn.Parameter(torch.ones(7, dtype=torch.bfloat16), requires_grad=False)
    flat = torch.cat([torch.zeros(7, dtype=torch.bfloat16), values.view(-1)])
    torch.nn.utils.vector_to_parameters(flat, [first, layer.weight])
    layer.weight[0].zero_()
    assert first.count_nonzero() == 0


def _inference(layer: nn.Linear, values: torch.Tensor) -> None:
    with torch.inference_mode():
        layer.weight.copy_(values)
        layer.weight.data[2:5] = 1.0
    layer.weight.mul_(0.5)


T = torch.randn(N, K, generator=torch.Generator().manual_seed(1), dtype=torch.float32).bfloat16() * 0.2
EVERYDAY: dict[str, Callable[[nn.Linear], Any]] = {
    "data": lambda layer: setattr(layer.weight, "data", T.clone()),
    "data twice": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "in float32": lambda layer: layer.weight.copy_(T.float()),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(T.clone(), requires_grad=False)),
    "parameters": lambda layer: layer._parameters.__setitem__("weight", nn.Parameter(T.clone(), requires_grad=False)),
    "register": lambda layer: _register(layer, T),
    "swap_tensors": lambda layer: _swap(layer, T),
    "vector_to_parameters": lambda layer: _flat(layer, T),
    "mask": lambda layer: _set(layer.weight, T > 0, 0.5),
    "rows": lambda layer: _set(layer.weight, torch.tensor([4, 1], dtype=torch.int64), T[:2]),
    "index_put_": lambda layer: layer.weight.index_put_(
        (torch.tensor([1, 1], dtype=torch.int64),), T[:2], accumulate=True
    ),
    "scatter_": lambda layer: layer.weight.scatter_(1, torch.tensor([[3], [5]], dtype=torch.int64), 2.0),
    "inference": lambda layer: _inference(layer, T),
    "no_grad": lambda layer: torch.no_grad()(layer.weight.lerp_)(T, 0.25),
    "prune": lambda layer: layer.weight.data.mul_(T > 0),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight, layer.weight[3:5]], 2.0),
    "copies": lambda layer: (layer.weight.float().zero_(), layer.weight.clone().zero_(), layer.weight.half().add_(3)),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    **{
        name: lambda layer, name=name: getattr(nn.init, name)(layer.weight)
        for name in ("xavier_uniform_", "kaiming_normal_", "trunc_normal_", "eye_", "zeros_")
    },
    "uniform_": lambda layer: nn.init.uniform_(layer.weight[4:9], 1.0, 2.0),
    "sparse_": lambda layer: nn.init.sparse_(layer.weight, 0.5),
}


@pytest.mark.parametrize("name", EVERYDAY)
def test_everyday_writes(name: str) -> None:
    """Until the next product they are there to the bit, however many steps they take; then each is rounded once."""
    x = torch.randn(3, K, dtype=torch.float32).bfloat16()
    for storage in ("discard", "keep"):
        for scheme in ("row", "tiles"):
            layer = matrix(scheme, storage)
            parameter = layer.weight
            dense = nn.Linear(K, N, dtype=torch.bfloat16).requires_grad_(False)
            dense.weight.data = layer.weight.dequantize() if name == "data twice" else exact(layer.weight)
            dense.bias.data = layer.bias.detach().clone()
            for _ in range(2):
                layer(x)
            for one in (layer, dense):
                torch.manual_seed(4)
                EVERYDAY[name](one)
            weight = layer.weight
            if name in ("swap_tensors", "parameters", "register"):  # as was asked: the parameter itself is another one
                assert type(weight) is nn.Parameter
                assert weight.equal(dense.weight)
            else:
                assert weight is parameter
                assert exact(weight).equal(dense.weight)
                assert layer.scaled().data.dtype == torch.float8_e4m3fn
            y = layer(x)
            near(y, F.linear(x, weight.dequantize() if isinstance(weight, FP8Weight) else weight, layer.bias))


@pytest.mark.parametrize("scheme", ["row", "tiles", "tensor"])
def test_copies_between_weights(scheme: str) -> None:
    """By their bytes where the scales' grids agree, as values where they do not."""
    for other in ("row", "tiles", "tensor"):
        for view in (lambda w: w, lambda w: w[8:24], lambda w: w.t(), lambda w: w[:, 3:5]):
            target, source = matrix(scheme).weight, matrix(other).weight
            twin = check_write(target, lambda w, view=view, source=source: view(w).copy_(view(source)))
            whole_blocks = scheme == other and view(target).size() == target.size()
            if whole_blocks:
                assert target.scaled().data.view(torch.uint8).equal(source.scaled().data.view(torch.uint8))
            plain = torch.empty(N, K, dtype=torch.float32)
            assert plain.copy_(target).equal(target.dequantize().float())
            assert twin.shape == target.shape


# --- autograd -----------------------------------------------------------------------------------------------------

PRODUCTS: dict[str, Callable[[FP8Linear, torch.Tensor], torch.Tensor]] = {
    "layer": lambda layer, x: layer(x),
    "linear": lambda layer, x: F.linear(x, layer.weight),
    "matmul": lambda layer, x: x @ layer.weight.T,
    "rows": lambda layer, x: F.linear(x, layer.weight[8:16]),
}
SEEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "add_": lambda w: w.add_(1),
    "view": lambda w: w[9].zero_(),
    "detach": lambda w: w.detach().zero_(),
    "view of detach": lambda w: w.detach()[8:16].t().zero_(),
    "copy_": lambda w: w.copy_(T),
    "bytes": lambda w: w.detach().copy_(matrix("row").weight),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_backward_after_a_write_raises(product: str) -> None:
    for write in SEEN.values():
        layer = matrix("row")
        x = torch.randn(3, K, dtype=torch.float32).bfloat16().requires_grad_()
        y = PRODUCTS[product](layer, x)
        with torch.no_grad():
            write(layer.weight)
        with pytest.raises(RuntimeError, match="modified"):
            y.sum().backward()
        PRODUCTS[product](layer, x).sum().backward()
        assert x.grad is not None


# --- products -----------------------------------------------------------------------------------------------------

X = torch.randn(5, K, generator=torch.Generator().manual_seed(8), dtype=torch.float32).bfloat16()
X3 = X.view(1, 5, K).repeat(2, 1, 1)
ONE_PRODUCT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one dimension": lambda w: F.linear(X[0], w),
    "two dimensions": lambda w: F.linear(X, w),
    "three dimensions": lambda w: F.linear(X3, w),
    "x @ w.T": lambda w: X @ w.T,
    "three dimensions @ w.T": lambda w: X3 @ w.mT,
    "matmul from the left": lambda w: torch.matmul(w, X.T),
    "mv": lambda w: torch.mv(w, X[0]),
    "einsum": lambda w: torch.einsum("bk,nk->bn", X, w),
    "einsum from the left": lambda w: torch.einsum("nk,btk->btn", w, X3),
    "rows": lambda w: F.linear(X, w[8:24]),
    "rows of a view": lambda w: F.linear(X, w.view(5, 8, K)[1]),
    "four dimensions and back": lambda w: F.linear(X, w[:, :, None, None][:, :, 0, 0]),
    "three dimensions and back": lambda w: F.linear(X, w[None].squeeze(0)),
    "expanded": lambda w: torch.bmm(X3, w.t().expand(2, -1, -1)),
    "addmm": lambda w: torch.addmm(T[0, :N].float().bfloat16(), X, w.t()),
    "baddbmm": lambda w: torch.matmul(X3, w.t()),
}


@pytest.mark.parametrize("name", ONE_PRODUCT)
def test_one_product_and_nothing_dequantized(name: str) -> None:
    for scheme in ("row", "tensor", "groups"):
        weight = matrix(scheme).weight
        dense, activity = weight.dequantize(), weight.activity
        before = activity.calls, activity.dequantizations
        y = ONE_PRODUCT[name](weight)
        assert (activity.calls, activity.dequantizations) == (before[0] + 1, before[1])
        wanted = ONE_PRODUCT[name](dense)
        assert y.shape == wanted.shape
        near(y, wanted)


def test_parts_are_a_product_each() -> None:
    weight = matrix("row").weight
    dense, activity = weight.dequantize(), weight.activity
    for parts in (weight.chunk(5), weight.split([8, 32]), weight.unflatten(0, (5, 8))):
        calls, dequantized = activity.calls, activity.dequantizations
        y = torch.cat([F.linear(X, part) for part in parts], dim=-1)
        assert (activity.calls, activity.dequantizations) == (calls + len(parts), dequantized)
        near(y, F.linear(X, dense))
    ids = torch.tensor([[1, 5, 5]], dtype=torch.int64)
    assert F.embedding(ids, weight).equal(F.embedding(ids, dense))
    assert activity.dequantizations == dequantized


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
        lambda w: torch.cat([T, T], out=w),
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
    with pytest.raises(ValueError, match="read-only"):  # it would not reach the weight
        array[0] = 1


def test_no_write_is_lost_to_another_thread() -> None:
    """One thread quantizes what another one is writing: each row is written once, and all are there in the end."""
    for _ in range(2):
        layer, done = matrix("row"), threading.Event()

        def read(layer: FP8Linear = layer, done: threading.Event = done) -> None:
            while not done.is_set():
                layer.scaled()

        reader = threading.Thread(target=read)
        reader.start()
        for row in range(N):
            layer.weight[row] = 2.0
            layer.weight.data[row, ::2].mul_(2)
        done.set()
        reader.join()
        assert dequantize(layer.scaled()).equal(torch.tensor([4.0, 2.0], dtype=torch.float32).repeat(N, K // 2))
