"""Products of very small and very large numbers: no engine leaves the range of the dtype in intermediate results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fp8gemm import ENGINES, SCHEMES, dequantize, quantize
from fp8gemm.engines import cpu
from fp8gemm.engines.reference import ReferenceEngine

SMALLEST, LARGEST = 1e-6, 6e4
# The rounding of a product, per dtype; bfloat16 twice, since plain torch rounds before it scales.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def check(
    engine: str, scheme: str, dtype: torch.dtype, stored: torch.dtype, m: int, size: float, weights: float
) -> None:
    generator = torch.Generator().manual_seed(m)
    k, n = 512, 24
    w = torch.randn(n, k, generator=generator, dtype=torch.float32) * weights
    x = torch.randn(m, k, generator=generator, dtype=torch.float32) * size
    x[:, 0] = size  # whatever the other elements are
    x = x.clamp(-LARGEST, LARGEST).to(dtype)
    bias = torch.randn(n, generator=generator, dtype=torch.float32).to(dtype)
    weight = quantize(w, SCHEMES[scheme].weight, dtype=stored)
    runs = ENGINES[engine]
    packed = runs.prepare(weight, SCHEMES[scheme])
    y = runs.linear(x, packed, bias, dtype)
    rounded = ReferenceEngine().rounded(x, packed).double()
    dense = dequantize(weight, torch.float64)
    expected = rounded @ dense.t() + bias.double()
    magnitude = rounded.abs() @ dense.abs().t() + bias.double().abs()
    # Float32 sums of k products, weights rounded to bfloat16 with block scales, and at most two roundings of the
    # result.
    allowed = magnitude * (k * 2.0**-24 + 2 * UNIT[dtype]) + torch.finfo(dtype).smallest_normal
    reaches = expected.abs() + allowed < torch.finfo(dtype).max
    assert y[reaches].isfinite().all(), f"{int((~y[reaches].isfinite()).sum())} of {y.numel()} outputs are not finite"
    assert ((y.double() - expected).abs() <= allowed)[reaches].all()
    assert not y.isnan().any()


@settings(max_examples=150, deadline=None)
@given(
    engine=st.sampled_from(["cpu", "torch alone", "reference"]),
    scheme=st.sampled_from(list(SCHEMES)),
    dtype=st.sampled_from(list(UNIT)),
    stored=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    m=st.sampled_from([1, 3, 40]),
    exponent=st.floats(-6, 4.778),
    weights=st.sampled_from([1e-5, 0.02, 1.0]),
)
@example("torch alone", "row", torch.float16, torch.float8_e4m3fn, 3, 3.3, 0.02)
@example("cpu", "row", torch.float16, torch.float8_e5m2, 3, 0.6, 0.02)
@example("cpu", "block", torch.float16, torch.float8_e5m2, 1, 3.3, 0.02)
def test_no_product_leaves_its_range(engine, scheme, dtype, stored, m, exponent, weights):
    with pytest.MonkeyPatch.context() as patch:
        if engine == "torch alone":
            patch.setattr(cpu, "_library", lambda *operands: None)
            engine = "cpu"
        check(engine, scheme, dtype, stored, m, min(max(10.0**exponent, SMALLEST), LARGEST), weights)
