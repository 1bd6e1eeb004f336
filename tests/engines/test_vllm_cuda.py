"""vLLM's CUDA path without a GPU: fakes that check the kernels' requirements and compute the same results."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import conformance
import pytest
import torch

from fp8gemm import BLOCK_128, GROUP_128, ROW, SCHEMES, TENSOR, Machine, MatmulSpec, ScaledTensor, Scheme, quantize
from fp8gemm.engines.reference import ReferenceEngine
from fp8gemm.engines.vllm import Vllm, cuda
from fp8gemm.engines.vllm.engine import VllmEngine
from fp8gemm.numerics import expand_scale

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
FLOATS = (BF16, torch.float16, torch.float32)
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


def _per_token(q: Any, x: Any, scale: Any, bound: Any) -> None:
    assert x.dtype in FLOATS
    assert x.is_contiguous()
    assert q.shape == x.shape
    assert bound is None
    assert scale.shape == (x.shape[0], 1)
    rounded = quantize(x, ROW)
    q.copy_(rounded.data)
    scale.copy_(rounded.scale)


def _static(q: Any, x: Any, scale: Any) -> None:
    assert x.dtype in FLOATS
    assert scale.shape == (1,)
    q.copy_(quantize(x, TENSOR, scale=scale.reshape(1, 1)).data)


class _PerGroup:
    default = SimpleNamespace(_schema=SimpleNamespace(arguments=range(10)))

    def __call__(self, x: Any, q: Any, scale: Any, group: int, *rest: Any) -> None:
        assert group == 128
        assert len(rest) == 6
        assert scale.stride(0) == 1
        rounded = quantize(x, GROUP_128)
        q.copy_(rounded.data)
        scale.copy_(rounded.scale)


@pytest.fixture(autouse=True)
def _ops(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = SimpleNamespace(
        cutlass_scaled_mm=_cutlass,
        dynamic_per_token_scaled_fp8_quant=_per_token,
        static_scaled_fp8_quant=_static,
        per_token_group_fp8_quant=_PerGroup(),
    )
    monkeypatch.setattr(cuda.torch, "ops", SimpleNamespace(_C=ops))


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


def test_calls_that_need_more_than_two_ops_are_not_bound() -> None:
    engine, x = OnCard(), torch.randn(8, 64).to(BF16)
    row, static = SCHEMES["row"], Scheme(weight=ROW, activation=ROW, static=True)
    assert cuda.bind(x, engine.prepare(quantize(torch.randn(40, 64), ROW), row), None, BF16) is None
    assert cuda.bind(x.float(), engine.prepare(quantize(torch.randn(48, 64), ROW), row), None, torch.float32) is None
    assert cuda.bind(x, engine.prepare(quantize(torch.randn(48, 64), ROW), row), torch.randn(48), BF16) is None
    scaled = engine.prepare(quantize(torch.randn(48, 64), ROW), static, input_scale=torch.tensor(0.1))
    assert cuda.bind(x, scaled, None, BF16) is None
    block = engine.prepare(quantize(torch.randn(128, 128), BLOCK_128), SCHEMES["block"])
    assert cuda.bind(torch.randn(8, 128).to(BF16), block, None, BF16) is None


def _dense(weight: ScaledTensor) -> torch.Tensor:
    return weight.data.double() * expand_scale(weight.scale, weight.granularity, weight.shape)


def test_precise_sums_are_what_it_does_not_have() -> None:
    spec = MatmulSpec(scheme=SCHEMES["row"], n=256, k=256, accumulate="precise")
    assert OnCard().rejects(spec, H100) == [
        "its CUTLASS products with row scales leave partial sums in the tensor cores' accumulator, found K = 256 and "
        "accumulate='precise'"
    ]
    assert OnCard().rejects(MatmulSpec(scheme=SCHEMES["block"], n=256, k=256, accumulate="precise"), H100) == []


def test_a_kernel_that_is_given_too_little_is_caught() -> None:
    """The fakes can fail."""
    with pytest.raises(AssertionError):
        _cutlass(*(torch.zeros(4, 17, dtype=BF16), torch.zeros(4, 16).to(E4M3), torch.zeros(16, 17).to(E4M3)), 1, 1, 0)
