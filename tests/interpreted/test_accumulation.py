"""Where FP8 products add up: in the accumulator of the tensor cores, or in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stage import ADA, OnCard
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fp8gemm import ROW, ScaledTensor, Scheme

BF16, FP32 = torch.bfloat16, torch.float32
ROW_ROW = Scheme(weight=ROW, activation=ROW)


@pytest.mark.parametrize("stack", [False, True], ids=["linear", "grouped"])
def test_precise_sums_survive_a_short_accumulator(stack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accumulators of 13 bits, as Ada's, lose what is small beside the total; precise sums do not."""

    def short(builder, a, b, total, precision, imprecise):
        added = multiply(builder, a, b, total, precision, imprecise)
        kept = torch.from_numpy(added.data.astype("float32")).view(torch.int32) & ~0x3FF
        return TensorHandle(kept.view(torch.float32).numpy(), added.dtype.scalar)

    multiply = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", short)
    engine, m, n, k = OnCard(ADA), 65, 16, 1024
    w = torch.zeros(n, k)
    w[:, :128], w[:, 128::4] = 64.0, 1.0  # 2**20 in the first step, then 32 in each of 7, below 2**20 / 2**13
    x = torch.ones(m, k)
    x[:, :128] = 128.0
    one = ScaledTensor(w.to(torch.float8_e4m3fn), torch.ones(n, 1), ROW)
    x[:, 129] = 448.0  # a scale of 1; the weight is 0 there
    found = {}
    for accumulate in ("fast", "precise"):
        if stack:
            weights = ScaledTensor(one.data[None], one.scale[None], ROW)
            layout = replace(engine.prepare_stack(weights, ROW_ROW), accumulate=accumulate)
            y = engine.grouped(x.to(BF16), layout, torch.tensor([m], dtype=torch.int32), None, FP32)
        else:
            y = engine.linear(x.to(BF16), replace(engine.prepare(one, ROW_ROW), accumulate=accumulate), None, FP32)
        found[accumulate] = set(y.flatten().tolist())
    assert found == {"fast": {2.0**20}, "precise": {2.0**20 + 7 * 32}}
