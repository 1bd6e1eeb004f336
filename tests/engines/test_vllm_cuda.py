"""vLLM's CUDA path without a GPU: fakes that check the kernels' requirements and compute the same results."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import conformance
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fp8gemm import BLOCK_128, GROUP_128, ROW, SCHEMES, TENSOR, Machine, MatmulSpec, ScaledTensor, Scheme, quantize
from fp8gemm.engines import proof
from fp8gemm.engines.activations import quantize_tokens
from fp8gemm.engines.reference import ReferenceEngine
from fp8gemm.engines.vllm import Vllm, cuda
from fp8gemm.engines.vllm.engine import VllmEngine
from fp8gemm.numerics import expand_scale

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
CPU = torch.device("cpu")
H100 = Machine(
    device="cuda",
    capability=(9, 0),
    found={"vllm": Vllm("0.25.1", {name: counts[-1] for name, counts in cuda.OPS.items()})},
)


class OnCard(VllmEngine):
    """The engine as on a GPU."""

    prepare = staticmethod(lambda weight, scheme, *, input_scale=None: cuda.prepare(weight, scheme, input_scale))
    restore = staticmethod(cuda.restore)
    linear = staticmethod(cuda.linear)


def _cutlass(y: Any, a: Any, b: Any, a_scale: Any, b_scale: Any, bias: Any) -> None:
    (m, k), n = a.shape, b.shape[1]
    assert a.dtype == b.dtype == E4M3
    assert y.dtype in (BF16, torch.float16)
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert y.is_contiguous()
    assert n % 16 == 0
    assert k % 16 == 0
    assert a_scale.dtype == b_scale.dtype == torch.float32
    block = a_scale.numel() not in (1, m) or b_scale.numel() not in (1, n)  # as c3x/scaled_mm_helper.hpp decides
    if block:
        assert m % 4 == 0
        assert (a_scale.shape, b_scale.shape) == ((m, k // 128), (k // 128, n // 128))
        assert a_scale.stride(0) == 1
        left = a.double() * expand_scale(a_scale, GROUP_128, a.shape)
        right = b.t().double() * expand_scale(b_scale.t(), BLOCK_128, (n, k))
        assert bias is None
    else:
        left, right = a.double() * a_scale.reshape(-1, 1), b.t().double() * b_scale.reshape(-1, 1)
    product = left @ right.t()
    if bias is not None:
        assert bias.dtype == y.dtype
        product = product + bias.double()
    y.copy_(product)


@pytest.fixture(autouse=True)
def _ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cuda.torch, "ops", SimpleNamespace(_C=SimpleNamespace(cutlass_scaled_mm=_cutlass), aten=torch.ops.aten)
    )


def test_conforms() -> None:
    assert conformance.check(OnCard(), H100, CPU) > 20


@pytest.mark.parametrize(("name", "static"), [("row", False), ("tensor", False), ("block", False), ("tensor", True)])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_quantized_before(name: str, dtype: torch.dtype, static: bool) -> None:
    """Activations that were quantized beforehand give the same product."""
    scheme = SCHEMES[name]
    engine, n, k = OnCard(), 200, 300
    input_scale = torch.tensor(0.02) if static else None
    scheme = Scheme(weight=scheme.weight, activation=scheme.activation, static=static)
    weight = engine.prepare(quantize(torch.randn(n, k), scheme.weight), scheme, input_scale=input_scale)
    bias = torch.randn(n).to(dtype)
    for m in (0, 1, 5, 8):
        x = torch.randn(m, k).to(dtype)
        assert weight.few == 0
        y = engine.linear_quantized(quantize(x, weight.apart, scale=input_scale), weight, bias, dtype)
        assert y.equal(engine.linear(x, weight, bias, dtype))
        rounded = ReferenceEngine().rounded(x, weight).double()
        expected = rounded @ _dense(engine.restore(weight)).t() + bias.double()
        assert (y.double() - expected).norm() <= engine.tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_bound_calls(with_bias: bool, dtype: torch.dtype) -> None:
    engine = OnCard()
    weight = engine.prepare(quantize(torch.randn(48, 64), ROW), SCHEMES["row"])
    bias = torch.randn(48).to(dtype) if with_bias else None
    bound = cuda.bind(torch.empty(2, 3, 64, dtype=dtype), weight, bias, dtype)
    assert bound is not None
    for _ in range(2):
        x = torch.randn(2, 3, 64).to(dtype)
        assert bound(x).view(6, 48).equal(engine.linear(x.view(6, 64), weight, bias, dtype))


def test_calls_that_need_more_than_two_launches_are_not_bound() -> None:
    engine, x, row = OnCard(), torch.randn(8, 64).to(BF16), SCHEMES["row"]
    assert cuda.bind(x, engine.prepare(quantize(torch.randn(40, 64), ROW), row), None, BF16) is None
    assert cuda.bind(x.float(), engine.prepare(quantize(torch.randn(48, 64), ROW), row), None, torch.float32) is None
    assert cuda.bind(x, engine.prepare(quantize(torch.randn(48, 64), ROW), row), torch.randn(48), BF16) is None
    block = engine.prepare(quantize(torch.randn(128, 128), BLOCK_128), SCHEMES["block"])
    assert cuda.bind(torch.randn(8, 128).to(BF16), block, None, BF16) is None


def test_static_scales_are_bound() -> None:
    engine, x = OnCard(), torch.randn(8, 64).to(BF16)
    static = Scheme(weight=ROW, activation=TENSOR, static=True)
    weight = engine.prepare(quantize(torch.randn(48, 64), ROW), static, input_scale=torch.tensor(0.02))
    bound = cuda.bind(x, weight, None, BF16)
    assert bound is not None
    assert bound(x).equal(engine.linear(x, weight, None, BF16))


class Copies(TorchDispatchMode):
    """Counts the operations that copy tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name() in ("aten::constant_pad_nd", "aten::clone", "aten::copy_", "aten::_to_copy"):
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["row", "tensor", "block"])
def test_nothing_is_copied_where_nothing_is_padded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = SCHEMES[name]
    weight = cuda.prepare(quantize(torch.randn(256, 512), scheme.weight), scheme, None)
    x, bias = torch.randn(64, 512).to(BF16), torch.randn(256).to(BF16)
    rounded = quantize_tokens(x, weight.apart)
    monkeypatch.setattr(cuda, "quantize_tokens", lambda *_, **__: rounded)  # by a kernel, on a GPU
    monkeypatch.setattr(cuda.torch.ops._C, "cutlass_scaled_mm", lambda *_: None)
    with Copies() as copies:
        cuda.linear(x, weight, bias, BF16)
        cuda.linear_quantized(ScaledTensor(*rounded, weight.apart), weight, bias, BF16)
    assert copies.found == []
    ragged = quantize(torch.randn(63, 512), weight.apart)
    with Copies() as copies:
        cuda.linear_quantized(ragged, weight, bias, BF16)
    assert bool(copies.found) == (name == "block"), "the counter can fail: 63 tokens are padded to 64"


def _dense(weight: ScaledTensor) -> torch.Tensor:
    return weight.data.double() * expand_scale(weight.scale, weight.granularity, weight.shape)


def test_precise_sums_are_what_it_does_not_have() -> None:
    spec = MatmulSpec(scheme=SCHEMES["row"], n=256, k=256, accumulate="precise")
    assert OnCard().rejects(spec, H100) == [
        "its CUTLASS products with row scales leave partial sums in the tensor cores' accumulator, found K = 256 and "
        "accumulate='precise'"
    ]
    assert OnCard().rejects(MatmulSpec(scheme=SCHEMES["block"], n=256, k=256, accumulate="precise"), H100) == []


def test_versions_that_read_block_scales_in_another_order_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Hopper's kernel did between vllm#23280 and #28431: by address, whatever the strides are."""
    engine, spec = OnCard(), MatmulSpec(scheme=SCHEMES["block"], n=4096, k=4096)
    assert proof.problem(engine, spec, CPU) == ""

    def n_major(y: Any, a: Any, b: Any, a_scale: Any, b_scale: Any, bias: Any) -> None:
        _cutlass(y, a, b, a_scale, b_scale.as_strided(b_scale.shape, (b_scale.shape[1], 1)), bias)

    monkeypatch.setattr(cuda.torch.ops._C, "cutlass_scaled_mm", n_major)
    assert "is exact, under weight 128x128" in proof.problem(OnCard(), spec, CPU)
    assert proof.problem(OnCard(), MatmulSpec(scheme=SCHEMES["row"], n=4096, k=4096), CPU) == ""


def test_a_kernel_that_is_given_too_little_is_caught() -> None:
    """The fakes can fail."""
    with pytest.raises(AssertionError):
        _cutlass(*(torch.zeros(4, 17, dtype=BF16), torch.zeros(4, 16).to(E4M3), torch.zeros(16, 17).to(E4M3)), 1, 1, 0)
