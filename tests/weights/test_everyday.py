"""Ordinary writes to a model's weights, in several steps and from several threads, and products with views."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twins import K, N, check_write, exact, matrix, near, put

from fp8gemm.numerics import dequantize
from fp8gemm.weights import FP8Linear, FP8Weight

# --- everyday writes ----------------------------------------------------------------------------------------------


def _swap(layer: nn.Linear, values: torch.Tensor) -> None:
    torch.utils.swap_tensors(layer.weight, nn.Parameter(values.clone(), requires_grad=False))


def _register(layer: nn.Linear, values: torch.Tensor) -> None:
    del layer.weight
    layer.register_parameter("weight", nn.Parameter(values.clone(), requires_grad=False))


def _flat(layer: nn.Linear, values: torch.Tensor) -> None:
    """The second parameter follows the first in one flat tensor."""
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
    "mask": lambda layer: put(layer.weight, T > 0, 0.5),
    "rows": lambda layer: put(layer.weight, torch.tensor([4, 1], dtype=torch.int64), T[:2]),
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
    """Pending writes are exact over any number of steps; the next product rounds each value once."""
    x = torch.randn(3, K, dtype=torch.float32).bfloat16()
    for storage in ("discard", "keep"):
        for scheme in ("row", "tiles"):
            layer = matrix(scheme, storage)
            parameter = layer.weight
            dense = nn.Linear(K, N, dtype=torch.bfloat16).requires_grad_(False)
            dense.weight.data = exact(layer.weight)
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
    """Copies bytes if the granularities agree, and values otherwise."""
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


def _room(*shape: int) -> torch.Tensor:
    """What a product is written to."""
    return torch.zeros(shape, dtype=torch.bfloat16)


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
    "addmv": lambda w: torch.addmv(T[0, :N].float().bfloat16(), w, X[0], alpha=2.0),
    "names": lambda w: F.linear(input=X, weight=w),
    "names of mm": lambda w: torch.mm(input=X, mat2=torch.t(input=w)),
    "names of matmul": lambda w: X3.matmul(other=w.t()),
    "out of mm": lambda w: torch.mm(X, w.t(), out=_room(5, N)),
    "out of matmul": lambda w: torch.matmul(X3, w.T, out=_room(0)),
    "out of mv": lambda w: torch.mv(w, X[0], out=_room(N)),
    "out of addmm": lambda w: torch.addmm(_room(N) + 1, X, w.t(), beta=0.5, out=_room(N, 5).t()),
    "out of bmm": lambda w: torch.bmm(X3, w.t().expand(2, -1, -1), out=_room(2, 5, N)),
    "addmm_": lambda w: (_room(5, N) + 1).addmm_(X, w.t()),
    "baddbmm_": lambda w: (_room(2, 5, N) + 1).baddbmm_(X3, w.t().expand(2, -1, -1), alpha=2),
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


def test_what_does_not_fit_is_refused_as_for_a_dense_weight() -> None:
    weight = matrix("row").weight
    for room in (torch.zeros(5, N, dtype=torch.float32), torch.zeros(5, N, dtype=torch.bfloat16, device="meta")):
        for w in (weight, weight.dequantize()):
            with pytest.raises(RuntimeError):
                torch.mm(X, w.t(), out=room)
    with pytest.warns(UserWarning, match="resized"):
        near(torch.mm(X, weight.t(), out=_room(3)), F.linear(X, weight.dequantize()))


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


def test_no_write_is_lost_to_another_thread() -> None:
    """One thread quantizes while another writes: each row is written once, and no write is lost."""
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


def test_the_data_of_a_kept_weight_is_the_original() -> None:
    """In reads and in products, by which adapters merge; the parameter itself has the values it multiplies by."""
    for storage in ("keep", "discard"):
        layer = matrix("row", storage)
        weight, x = layer.weight, torch.randn(4, K).bfloat16()
        original = exact(weight).clone()
        rounded = weight.dequantize()
        assert original.equal(rounded) == (storage == "discard")
        for source, expected in ((weight, rounded), (weight.data, original)):
            copied = torch.empty_like(original).copy_(source)
            for values in (source + 0, source.abs() * expected.sign(), copied, torch.cat([source])):
                assert values.equal(expected)
        turn = torch.randn(K, K).bfloat16()
        for found, w in (
            (torch.mm(turn, weight.data.transpose(0, 1)), original),
            (torch.mm(weight.data.clone(), turn), original),
        ):
            expected = turn @ w.T if found.shape == (K, N) else w @ turn
            near(found, expected)
            assert found.equal(expected) or storage == "discard"
        for parameter in (weight, nn.Parameter(weight.data, requires_grad=False)):
            near(F.linear(x, parameter), F.linear(x, rounded))
            assert not F.linear(x, parameter).equal(F.linear(x, original)) or storage == "discard"
