"""Only plain memory reaches C: tensors without it run through the registered operation, or raise an error."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, native, quantize, report
from fp8gemm.native.library import _problem

FOUND = native.find()
compiled = pytest.mark.skipif(isinstance(FOUND, native.Unavailable), reason="there are no compiled kernels here")


class Watch(TorchDispatchMode):
    """A mode that records every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    mlp = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).requires_grad_(False)
    patched = enable_fp8_gemm(mlp.to(getattr(torch, request.param)))
    for _ in range(3):  # so that calls of this shape are bound
        patched(inputs(patched))
    return patched


def inputs(model: nn.Module) -> torch.Tensor:
    return torch.linspace(-2, 2, 3 * 64).reshape(3, 64).to(model[0].compute_dtype)


def test_modes_see_the_product(model: nn.Module) -> None:
    x = inputs(model)
    with Watch() as watch:
        y = model(x)
    assert y.equal(model(x))
    assert watch.seen.count("aten.addmm.default") == 2
    graph = make_fx(model)(x)
    assert [str(node.target) for node in graph.graph.nodes].count("fp8gemm.linear.rows") == 2
    assert graph(x).equal(model(x))
    other = torch.randn(3, 64).to(x.dtype)
    assert graph(other).equal(model(other))


def test_functional_tensors(model: nn.Module) -> None:
    x = inputs(model)
    assert torch.func.functionalize(model)(x).equal(model(x))
    with FunctionalTensorMode():
        y = torch._from_functional_tensor(model(FunctionalTensor.to_functional(x)).elem)
    assert y.equal(model(x))


def test_fake_tensors(model: nn.Module) -> None:
    x = inputs(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(mode.from_tensor(x))
        assert isinstance(y, FakeTensor)
        assert y.shape == (3, 64)
    with FakeTensorMode():
        fake = enable_fp8_gemm(nn.Linear(64, 32))
        assert isinstance(fake(torch.empty(3, 64)), FakeTensor)
    with FakeTensorMode() as mode, pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        model(mode.from_tensor(x))  # what a dense model raises


def test_memory_with_the_other_sign(model: nn.Module) -> None:
    """The memory of a negative view has the negated values: tested as input, as bias and as the weight to quantize."""
    x = inputs(model)
    flipped = torch._neg_view(x)
    assert flipped.is_contiguous()
    for _ in range(3):
        assert model(flipped).equal(model(-x))
    layer = model[0]
    turned = torch.nn.functional.linear(x, layer.weight, torch._neg_view(layer.bias))
    assert turned.equal(torch.nn.functional.linear(x, layer.weight, -layer.bias))
    w = torch.randn(32, 64).to(x.dtype)
    for weight in (torch._neg_view(w), -w):
        linear = nn.Linear(64, 32, bias=False, dtype=x.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        assert enable_fp8_gemm(linear).scaled().data.float().equal(-quantize(w).data.float())


def test_tensors_that_are_zero_by_decree(model: nn.Module) -> None:
    x = inputs(model)
    assert model(torch._efficientzerotensor((3, 64), dtype=x.dtype)).equal(model(torch.zeros_like(x)))


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_sparse_and_nested_inputs_take_the_dense_product(model: nn.Module) -> None:
    layer, x = model[0], inputs(model)
    w = layer.weight.dequantize()
    before = layer.activity.dequantizations
    sparse = x.to_sparse()
    assert layer(sparse).equal(torch.nn.functional.linear(sparse, w, layer.bias))
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([x, x[:2]], layout=layout)
        for found, part in zip(layer(nested).unbind(), (x, x[:2]), strict=True):
            torch.testing.assert_close(found, torch.nn.functional.linear(part, w, layer.bias), rtol=0.02, atol=0.02)
    assert layer.activity.dequantizations > before


def test_vmap_is_the_batch(model: nn.Module) -> None:
    torch.testing.assert_close(torch.func.vmap(model)(inputs(model)), model(inputs(model)), rtol=0.02, atol=0.02)


DISTRIBUTED = """
import copy, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from fp8gemm import enable_fp8_gemm, report

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 96)).requires_grad_(False))
x = torch.randn(3, 64)
for _ in range(3):
    model(x)
try:
    model(distribute_tensor(x, mesh, [Replicate()]))
except RuntimeError as error:  # as a dense model does
    print("refused", str(error).splitlines()[0])
parallel = parallelize_module(copy.deepcopy(model), mesh, {"0": ColwiseParallel()})
print("ran", type(parallel[0].weight).__name__, torch.allclose(parallel(x), model(x), atol=1e-5))
sharded = distribute_module(nn.Sequential(nn.Linear(64, 96)), mesh)
enable_fp8_gemm(sharded)
y = sharded(distribute_tensor(x, mesh, [Replicate()]))
print("converted", report(sharded).converted[0].name, report(sharded).converted[0].calls, y.isfinite().all().item())
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_distributed_tensors_kill_nothing() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", DISTRIBUTED], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    # gloo prints, too
    told = [line for line in done.stdout.splitlines() if line.startswith(("refused", "ran", "converted"))]
    assert [line.split()[0] for line in told] == ["refused", "ran", "converted"], done.stdout
    assert "mixed torch.Tensor and DTensor" in told[0]
    assert told[1] == "ran DTensor True"
    assert told[2] == "converted 0 1 True"


def test_a_wrapped_weight_is_kept_with_its_name() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight = nn.Parameter(TwoTensor(torch.ones(8, 8), torch.ones(8, 8)))
    enable_fp8_gemm(model)
    assert [row.reason for row in report(model).kept] == [
        "its weight is a TwoTensor: patch the model before it is wrapped"
    ]


@compiled
def test_c_refuses_null() -> None:
    """The last check: a null pointer to any operand is reported as a status."""
    assert isinstance(FOUND, native.Library)
    x, data, scale, out = torch.ones(2, 8), torch.ones(4, 8).to(torch.float8_e4m3fn), torch.ones(4, 1), torch.ones(2, 4)
    for name in ("x", "data", "scale", "out"):
        problem = _problem(x, data, scale, 1, 8, None, out, True)
        setattr(problem, name, None)
        assert FOUND.functions.fp8gemm_linear(FOUND.level, 1, ctypes.byref(problem)) == -3
        assert FOUND.functions.fp8gemm_grouped(FOUND.level, 1, ctypes.byref(problem), 32, None, 1) == -3
    problem = _problem(x, data, scale, 1, 8, None, out, True)
    assert FOUND.functions.fp8gemm_linear(FOUND.level, 1, ctypes.byref(problem)) == 0


@compiled
def test_operands_without_memory_are_named() -> None:
    assert isinstance(FOUND, native.Library)
    weight, out = quantize(torch.randn(4, 8)), torch.empty(2, 4)
    with FakeTensorMode():
        fake = torch.empty(2, 8)
    with pytest.raises(ValueError, match=r"x must be .* on cpu, found FakeTensor, torch.float32 \[2, 8\]"):
        FOUND.linear(fake, weight.data, weight.scale, 1, 8, None, out)
    with pytest.raises(ValueError, match=r"x must be .* found FakeTensor"):
        FOUND.quantize(fake, 1, 8, torch.empty(2, 8, dtype=torch.uint8), torch.empty(2, 1))


@pytest.mark.parametrize("scheme", ["row", "block"])
def test_empty_inputs_of_any_stride(scheme: str) -> None:
    linear = nn.Linear(6, 5)
    patched = enable_fp8_gemm(linear, options=FP8GemmOptions(scheme=scheme), inplace=False)
    wide = torch.empty(0, 12)
    for x in (
        wide[:, ::2],
        torch.empty(6, 0).t(),
        torch.empty(2, 0, 12)[..., ::2],
        torch.empty(3, 0, 1).expand(3, 0, 6),
    ):
        assert patched(x).shape == linear(x).shape
        asked = x.clone().requires_grad_()
        patched(asked[..., :]).sum().backward()
        assert asked.grad is not None
        assert patched.bias.grad.eq(0).all()
