"""The observed first forward never changes what the model does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp8gemm import FP8Weight, enable_fp8_gemm, report
from fp8gemm.models import observation


class Encoder(nn.Module):
    """Its encoder layer runs torch's fused operation while it is dense."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.head = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@torch.inference_mode()
def test_a_fused_layer_that_stays_dense_is_counted_as_such() -> None:
    model = enable_fp8_gemm(Encoder().eval(), module_filter="head")
    x = torch.randn(2, 5, 64)
    y = model(x)
    assert torch.equal(model(x), y)
    coverage = report(model).coverage
    assert coverage is not None
    assert coverage.fp8 == {"head.weight": 10 * 64 * 64}
    assert coverage.dense["body.linear1.weight"] == 10 * 64 * 128
    assert coverage.dense["body.self_attn.in_proj_weight"] == 10 * 3 * 64 * 64


@torch.inference_mode()
def test_what_a_fused_layer_uses_is_no_factor_of_products() -> None:
    x = torch.randn(2, 5, 64)
    model = enable_fp8_gemm(Encoder().eval(), module_filter="head", example_inputs=x)
    assert [name for name, p in model.named_parameters() if isinstance(p, FP8Weight)] == ["head.weight"]


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_the_first_call_is_as_every_other(bias: bool) -> None:
    x = torch.randn(2, 64, 3, 4, dtype=torch.bfloat16)
    for given in (
        x.permute(0, 2, 3, 1),
        x.flatten(2).transpose(1, 2),
        x.permute(0, 2, 3, 1).contiguous(),
        x[0, :, 0].T,
    ):
        model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16)))
        first = model(given)
        for _ in range(3):
            assert torch.equal(model(given), first)


@torch.inference_mode()
def test_counting_that_fails_ends_no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise IndexError("a shape that nobody thought of")

    model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)))
    monkeypatch.setattr(observation, "multiply_adds", fails)
    x = torch.randn(4, 64)
    with pytest.warns(UserWarning, match=r"coverage of this forward is not known: IndexError: a shape"):
        y = model(x)
    assert torch.equal(model(x), y)
    assert report(model).coverage is None
    with pytest.raises(Exception, match="forward"):
        report(model).check(coverage=0.5)
