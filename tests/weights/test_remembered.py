"""F.linear with an FP8 weight repeats a decided call: whatever changes between two calls, the result is the new one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fp8gemm import FP8GemmOptions, enable_fp8_gemm
from fp8gemm.engines import ENGINES
from fp8gemm.weights.remembered import MOST_CALLS, Call


class Bare(nn.Module):
    """Multiplies by parameters of its own, which FP8Linear has no part in."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(48, 64, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(48, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def patched(scheme: str = "row") -> tuple[Bare, torch.Tensor]:
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    model = enable_fp8_gemm(Bare(), options=FP8GemmOptions(scheme=scheme), example_inputs=(x,))
    for _ in range(3):
        model(x)
    return model, x


def decided(model: Bare) -> list[Call]:
    return [call for call in model.weight._home.calls.values() if call]


def expected(model: Bare, x: torch.Tensor) -> torch.Tensor:
    """The product by a weight of its own that has no calls."""
    return F.linear(x, model.weight.clone(), model.bias.clone())


def _new_bias(model: Bare) -> None:
    model.bias.data = torch.ones(48, dtype=torch.bfloat16)


def _bias_in_place(model: Bare) -> None:
    model.bias.add_(1)


def _rows(model: Bare) -> None:
    model.weight[3:5] = 0.5


def _values(model: Bare) -> None:
    model.weight.data = torch.ones(48, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize("scheme", ["row", "block"])
@pytest.mark.parametrize("change", [_new_bias, _bias_in_place, _rows, _values])
@torch.no_grad()
def test_every_change_is_noticed(change: Callable[[Bare], None], scheme: str) -> None:
    model, x = patched(scheme)
    before = model(x)
    change(model)
    for _ in range(4):
        y = model(x)
        assert torch.equal(y, expected(model, x))
        assert not torch.equal(y, before)


@torch.no_grad()
def test_inputs_that_lie_otherwise() -> None:
    model, x = patched()
    wide = torch.randn(2, 5, 65, dtype=torch.bfloat16)
    for given in (x.transpose(0, 1).contiguous().transpose(0, 1), wide[..., 1:], x[:, :0], x[0, 0]):
        for _ in range(3):
            assert torch.equal(model(given), expected(model, given))
    with pytest.raises(RuntimeError):
        model(x.float())


@torch.no_grad()
def test_parts_of_a_weight_have_calls_of_their_own() -> None:
    model, x = patched()
    for _ in range(4):
        for rows in (slice(0, 16), slice(16, 32)):
            y = F.linear(x, model.weight[rows], model.bias[rows])
            assert torch.equal(y, expected(model, x)[..., rows])


def test_it_is_counted_and_seen_by_modes() -> None:
    model, x = patched()
    weight, engine = model.weight, ENGINES[model.weight.engine or ""]
    calls = weight.activity.calls
    model(x)
    assert weight.activity.calls == calls + 1
    if engine.bind(x, weight._home.form(x.dtype), None, x.dtype) is not None:
        assert decided(model)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == 2 * 10 * 48 * 64
    with torch.profiler.profile(acc_events=True) as profiler:
        model(x)
    assert [event.count for event in profiler.key_averages() if event.key == "fp8gemm::linear"] == [1]


@torch.no_grad()
def test_only_so_many_are_held() -> None:
    model, _ = patched()
    for tokens in range(1, 2 * MOST_CALLS):
        for _ in range(2):
            model(torch.zeros(tokens, 64, dtype=torch.bfloat16))
    assert len(model.weight._home.calls) <= MOST_CALLS
