"""torch.func, forward mode, hooks and modes around a patched model: each as around the dense twin.

The twin has the dequantized weights, and activations stay as they are, so that only the products differ.
Not part of the ordinary run: ``pytest tests/around``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.func
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fp8gemm import FP8GemmOptions, disable_fp8_gemm, enable_fp8_gemm

pytestmark = pytest.mark.filterwarnings("default")


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(dtype).eval()


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A model in FP8, and its dense twin of the same values."""
    options = FP8GemmOptions(scheme="weight_only", fp16_weight_storage="discard")
    return enable_fp8_gemm(mlp(dtype), options=options), disable_fp8_gemm(enable_fp8_gemm(mlp(dtype), options=options))[
        0
    ]


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y - expected).norm() / expected.norm()).item()


X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
T = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))


def _dual(model: nn.Module) -> torch.Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(X, T))).tangent
        assert tangent is not None
        return tangent.clone()


def _gradient(model: nn.Module, run: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
    x = X.clone().requires_grad_()
    (model(x) if run is None else run(model, x)).square().sum().backward()
    assert x.grad is not None
    return x.grad


def _twice(model: nn.Module) -> torch.Tensor:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    return second


def _of_each_sample(model: nn.Module) -> torch.Tensor:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    biases = {name: value for name, value in parameters.items() if name.endswith("bias")}

    def loss(changed: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {**parameters, **changed}, (x[None],)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(biases, X)["0.bias"]


def _saved_on_cpu(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model(x)


ALIKE: dict[str, Callable[[Any], torch.Tensor]] = {
    "functional_call with its own parameters": lambda m: torch.func.functional_call(
        m, dict(m.named_parameters()), (X,)
    ),
    "functional_call with another bias": lambda m: torch.func.functional_call(m, {"2.bias": torch.ones(64)}, (X,)),
    "functional_call with a dense weight": lambda m: torch.func.functional_call(
        m, {"2.weight": T.new_ones(64, 128)}, (X,)
    ),
    "functional_call with its state dict": lambda m: torch.func.functional_call(m, m.state_dict(), (X,)),
    "vmap": lambda m: torch.func.vmap(m)(torch.stack([X, T])),
    "jvp": lambda m: torch.func.jvp(m, (X,), (T,))[1],
    "jacrev": lambda m: torch.func.jacrev(m)(X[0]),
    "jacfwd": lambda m: torch.func.jacfwd(m)(X[0]),
    "hessian": lambda m: torch.func.hessian(lambda x: m(x).sum())(X[0]),
    "dual numbers": _dual,
    "gradients of each sample": _of_each_sample,
    "gradient": _gradient,
    "gradient of the gradient": _twice,
    "saved on the CPU": lambda m: _gradient(m, _saved_on_cpu),
    "checkpoint": lambda m: _gradient(m, lambda model, x: checkpoint(model, x, use_reentrant=False)),
    "checkpoint, reentrant": lambda m: _gradient(m, lambda model, x: checkpoint(model, x, use_reentrant=True)),
}


@pytest.mark.parametrize("use", ALIKE)
def test_it_is_as_around_the_dense_twin(use: str) -> None:
    model, twin = pair()
    before = model(X)
    assert error(ALIKE[use](model).detach(), ALIKE[use](twin).detach()) < 2e-6
    assert torch.equal(model(X), before)


def test_an_ensemble_by_stacked_state() -> None:
    models, twins = zip(*(pair() for _ in range(2)), strict=True)
    base = copy.deepcopy(models[0]).to("meta")
    parameters, buffers = torch.func.stack_module_state(list(models))

    def call(p: Any, b: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(base, (p, b), (x,))

    y = torch.func.vmap(call, in_dims=(0, 0, None))(parameters, buffers, X)
    assert error(y[1].detach(), twins[1](X).detach()) < 2e-6


def test_gradcheck_in_float64() -> None:
    model, _ = pair(torch.float64)
    assert torch.autograd.gradcheck(model, (X[:2].double().requires_grad_(),))
