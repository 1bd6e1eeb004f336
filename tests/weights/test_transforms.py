"""Tracers, counters, function transforms and autodiff treat FP8 weights like dense ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fp8gemm import FP8GemmOptions, disable_fp8_gemm, enable_fp8_gemm, report

WEIGHT_ONLY = FP8GemmOptions(scheme="weight_only")


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(4, 48, 32) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.up_proj.transpose(1, 2))


class Owner(nn.Module):
    """Multiplies by parameters of layers and by views of them, not by calling layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv.weight.chunk(3)
        return F.linear(x, q) + x @ k.T + F.linear(x, v, self.qkv.bias[64:])


def pair() -> tuple[nn.Module, nn.Module]:
    """A patched model and a dense one with the same values."""
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 8)), options=WEIGHT_ONLY)
    dense = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 8))
    dense.load_state_dict(model.state_dict(), strict=False)
    return model.requires_grad_(False), dense.requires_grad_(False)


X = torch.linspace(-2, 2, 6 * 32).reshape(6, 32)
TRANSFORMS: dict[str, Callable[[nn.Module], object]] = {
    "vmap": lambda m: vmap(m)(X),
    "grad": lambda m: grad(lambda x: m(x).square().sum())(X),
    "vmap of grad": lambda m: vmap(grad(lambda x: m(x).square().sum()))(X),
    "jvp": lambda m: jvp(m, (X,), (X.cos(),))[1],
    "jacrev": lambda m: jacrev(m)(X[0]),
    "jacfwd": lambda m: jacfwd(m)(X[0]),
    "hessian": lambda m: hessian(lambda x: m(x).square().sum())(X[0]),
    "functional_call": lambda m: functional_call(m, dict(m.named_parameters()), (X,)),
    "make_fx, real": lambda m: make_fx(m)(X)(X + 1),
    "make_fx, fake": lambda m: make_fx(m, tracing_mode="fake", _allow_non_fake_inputs=True)(X)(X + 1),
    "make_fx, symbolic": lambda m: make_fx(m, tracing_mode="symbolic", _allow_non_fake_inputs=True)(X)(X[:4]),
    "functionalize": lambda m: torch.func.functionalize(m)(X),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_give_what_the_dense_model_gives(name: str) -> None:
    model, dense = pair()
    torch.testing.assert_close(TRANSFORMS[name](model), TRANSFORMS[name](dense), rtol=1e-4, atol=1e-4)


def test_forward_derivatives_and_double_backward() -> None:
    found = []
    for model in pair():
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(X, X.cos()))).tangent
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        again = checkpoint(model, x, use_reentrant=False)
        found.append((tangent, first, second, *torch.autograd.grad(again.square().sum(), x)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_write_between_forward_and_backward_is_noticed() -> None:
    for model in pair():
        y = model(X.clone().requires_grad_()).sum()
        with torch.no_grad():
            model[0].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # torch 2.10's own
def test_products_are_counted_and_named() -> None:
    """The same number of floating-point operations as the dense model, also in the profiler."""
    model, dense = pair()
    counts = []
    for one in (model, dense):
        one(X)
        with FlopCounterMode(display=False) as counter:
            one(X)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 6 * (32 * 48 + 48 * 8)
    for _ in range(3):
        model(X)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(X)
    assert [event.count for event in profiler.key_averages() if event.key == "fp8gemm::linear"] == [2]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_products_stay_on_fp8_whoever_owns_the_weight(backend: str) -> None:
    """Experts and chunks of a fused weight as well; nothing is dequantized, writes are seen, and M may change."""
    for kind, shapes in ((Experts, [(4, 5, 32), (4, 9, 32)]), (Owner, [(5, 32), (9, 32)])):
        torch._dynamo.reset()
        model = enable_fp8_gemm(kind(), options=WEIGHT_ONLY).requires_grad_(False)
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
        for shape in shapes:
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        before = sum(row.dequantizations for row in report(model).rows)
        parameter = next(model.parameters())
        with torch.no_grad():
            parameter.mul_(2)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        assert sum(row.dequantizations for row in report(model).rows) <= before + 1  # the write itself
        disable_fp8_gemm(model)


INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "nested, strided": lambda: torch.nested.nested_tensor([X[:2], X[2:]]),
    "nested, jagged": lambda: torch.nested.nested_tensor([X[:2], X[2:]], layout=torch.jagged),
    "sparse, COO": lambda: X.relu().to_sparse(),
    "sparse, CSR": lambda: X.relu().to_sparse_csr(),
}


@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning", "ignore:.*beta state:UserWarning")
@pytest.mark.parametrize("kind", INPUTS)
@torch.no_grad()
def test_nested_and_sparse_inputs(kind: str) -> None:
    """As torch's own layer takes them."""
    found = []
    for model in pair():
        y = model[0](INPUTS[kind]())
        y = torch.cat(y.unbind()) if y.is_nested else y
        found.append(y.to_dense() if y.layout != torch.strided else y)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
