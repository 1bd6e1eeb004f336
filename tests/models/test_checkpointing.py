"""Recomputing activations in backward, from the very first forward pass on, which is also observed for the report."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fp8gemm import FP8GemmOptions, disable_fp8_gemm, enable_fp8_gemm, report


class Checkpointed(nn.Module):
    """A first layer, and two blocks whose activations are computed again in backward."""

    def __init__(self, run: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.run = run
        self.first = nn.Linear(32, 32)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)) for _ in "ab"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self.blocks, self.first(x))


RUNS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "without": lambda blocks, x: blocks(x),
    "not reentrant": lambda blocks, x: checkpoint(blocks, x, use_reentrant=False),
    "reentrant": lambda blocks, x: checkpoint(blocks, x, use_reentrant=True),
    "one by one": lambda blocks, x: checkpoint_sequential(blocks, 2, x, use_reentrant=False),
}


@pytest.mark.parametrize(("lazy", "autocast"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("run", RUNS)
def test_the_first_pass_is_recomputed_as_it_was(run: str, lazy: bool, autocast: bool) -> None:
    options = FP8GemmOptions(materialize_fp8_on_wrap=not lazy, scheme="weight_only")
    dense = Checkpointed(RUNS[run])
    model = enable_fp8_gemm(copy.deepcopy(dense), options=options)
    twin = disable_fp8_gemm(enable_fp8_gemm(dense, options=FP8GemmOptions(scheme="weight_only")))[0]
    x = torch.randn(5, 32)
    for _ in range(3):
        gradients = []
        for one in (model, twin):
            one.zero_grad()
            inputs = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = one(inputs)
            y.float().square().sum().backward()
            gradients.append([inputs.grad, one.first.bias.grad, one.blocks[1][2].bias.grad])
        for found, expected in zip(*gradients, strict=True):
            assert (found - expected).norm() <= (2**-6 if autocast else 1e-5) * expected.norm()
    coverage = report(model).coverage
    assert coverage is not None
    assert coverage.share == 1
    assert coverage.fp8 == {
        "first.weight": 5 * 32 * 32,
        **{f"blocks.{block}.{layer}.weight": 5 * 32 * 48 for block in (0, 1) for layer in (0, 2)},
    }
