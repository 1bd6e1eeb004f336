"""Products in all the forms that models use: each runs as one FP8 product and does not dequantize the weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, report

N, K = 96, 64
Form = Callable[[torch.Tensor], torch.Tensor]


def x(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


FORMS: dict[str, Form] = {
    "weight on the left of a batch": lambda w: w @ x(2, K, 5),
    "weight on the left of two batches": lambda w: w @ x(2, 3, K, 5),
    "weight on the left of a matrix": lambda w: w @ x(K, 5),
    "weight on the left of a vector": lambda w: torch.mv(w, x(K)),
    "time before batch": lambda w: x(7, 2, K).transpose(0, 1) @ w.T,
    "four dimensions": lambda w: x(2, 3, 7, K) @ w.mT,
    "a vector": lambda w: x(K) @ w.T,
    "strided input": lambda w: F.linear(x(5, 2 * K)[:, ::2], w),
    "einsum of tokens": lambda w: torch.einsum("btk,nk->btn", x(2, 5, K), w),
    "einsum, weight first": lambda w: torch.einsum("nk,btk->btn", w, x(2, 5, K)),
    "einsum with an ellipsis": lambda w: torch.einsum("...k,nk->...n", x(2, 5, K), w),
    "einsum over channels": lambda w: torch.einsum("bkl,nk->bnl", x(2, K, 5), w),
    "einsum into heads": lambda w: torch.einsum("btk,hdk->bhtd", x(2, 5, K), w.view(8, 12, K)),
    "a chunk": lambda w: F.linear(x(2, 5, K), w.chunk(3)[1]),
    "a part of a split": lambda w: F.linear(x(2, 5, K), w.split([32, 64])[1]),
    "a slice of rows": lambda w: x(2, 5, K) @ w[16:48].T,
    "one of three in a view": lambda w: F.linear(x(2, 5, K), w.view(3, 32, K)[1]),
    "heads flattened": lambda w: F.linear(x(2, 5, K), w.view(8, 12, K).flatten(0, 1)),
    "a bias added": lambda w: torch.addmm(x(N), x(5, K), w.t()),
    "a batch of one matrix": lambda w: torch.bmm(x(2, 5, K), w.t().expand(2, K, N)),
    "a batch added": lambda w: torch.baddbmm(x(2, 5, N), x(2, 5, K), w.t().expand(2, K, N), beta=0.5, alpha=2),
    "tensordot": lambda w: torch.tensordot(x(2, 5, K), w, dims=([2], [1])),
    "inner": lambda w: torch.inner(x(2, 5, K), w),
    "a chain": lambda w: torch.linalg.multi_dot([x(5, 20), x(20, K), w.t()]),
    "a convolution over one place": lambda w: F.conv1d(x(2, K, 9), w.unsqueeze(-1)),
    "a convolution of an image": lambda w: F.conv2d(x(2, K, 3, 3), w[:, :, None, None]),
    "a cast": lambda w: F.linear(x(5, K).bfloat16(), w.bfloat16()),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", FORMS)
def test_one_product_and_no_dequantization(name: str, mode: Callable[[], torch.no_grad]) -> None:
    layer = enable_fp8_gemm(nn.Linear(K, N, bias=False))
    dense = layer.weight.dequantize()
    activity = layer.weight.activity
    calls, dequantizations = activity.calls, activity.dequantizations
    with mode():
        found, expected = FORMS[name](layer.weight), FORMS[name](dense)
    assert found.shape == expected.shape
    # Float32 sums of 64 products in another order; bfloat16 adds one rounding.
    close = 2**-7 if found.dtype == torch.bfloat16 else 1e-4
    assert torch.allclose(found, expected, rtol=close, atol=close)
    if name != "a cast":  # whose weight is another, of the same bytes
        assert activity.calls == calls + 1
    assert activity.dequantizations == dequantizations


def test_groups_of_rows_are_a_product_each() -> None:
    layer = enable_fp8_gemm(nn.Linear(K, N, bias=False))
    activity, dense = layer.weight.activity, layer.weight.dequantize()
    before = activity.dequantizations
    for form in (
        lambda w: torch.bmm(x(3, 5, K), w.view(3, 32, K).transpose(1, 2)),
        lambda w: torch.cat([F.linear(x(5, K), part) for part in w.view(3, 32, K).unbind(0)]),
    ):
        calls = activity.calls
        assert torch.allclose(form(layer.weight), form(dense), rtol=1e-4, atol=1e-4)
        assert activity.calls == calls + 3
    assert activity.dequantizations == before


def test_a_first_call_under_a_mode_packs_the_weight_for_good() -> None:
    """The first forward after patching is observed; weights that were not packed before it are then, as ever."""
    layers = [nn.Linear(64, 96), nn.Linear(96, 64)]
    options = FP8GemmOptions(materialize_fp8_on_wrap=False)
    model = enable_fp8_gemm(nn.Sequential(*layers), options=options)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model[0](torch.ones(4, 64))
    model(torch.ones(4, 64))
    assert counter.get_total_flops() == 2 * 4 * 64 * 96
    assert [layer.home.stored.packed is not None for layer in model] == [True, True]
    assert all(row.engine for row in report(model).rows)
