"""Pipeline parallelism: stages on different ranks, made by hand or by torch's tracer."""

from __future__ import annotations

import pytest
import torch
from ranks import Case, Cases, Rank
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, SplitPoint, pipeline

from fp8gemm import enable_fp8_gemm, report
from fp8gemm.weights import FP8Weight

cases = Cases("Pipeline stages")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Layers(nn.Module):
    def __init__(self, rank: Rank) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(rank.world))
        self.requires_grad_(False).to(rank.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def run(rank: Rank, stage: PipelineStage) -> torch.Tensor | None:
    x = torch.randn(4 * rank.world, 64, generator=torch.Generator().manual_seed(1)).to(rank.device)
    schedule = ScheduleGPipe(stage, n_microbatches=rank.world)
    y = schedule.step(*([x] if rank.number == 0 else []))
    if rank.number == rank.world - 1:
        torch.testing.assert_close(y, enable_fp8_gemm(Layers(rank))(x))
    return y


@cases.works("stages made by hand, patched before or after")
def _(rank: Rank) -> None:
    for patch_first in (True, False):
        model = Layers(rank)
        if patch_first:
            enable_fp8_gemm(model)
        mine = model.layers[rank.number]
        if not patch_first:
            enable_fp8_gemm(mine)
        run(rank, PipelineStage(mine, rank.number, rank.world, rank.device))
        rows = report(mine).converted  # a stage also runs once to find out the shapes that it sends
        assert all(row.calls >= rank.world and not row.dequantizations for row in rows)


@cases.works("stages of torch's tracer")
def _(rank: Rank) -> None:
    for patch_first in (True, False):
        model = Layers(rank)
        if patch_first:
            enable_fp8_gemm(model)
        cuts = {f"layers.{place}": SplitPoint.BEGINNING for place in range(1, rank.world)}
        example = torch.randn(4, 64, device=rank.device)
        made = pipeline(model, mb_args=(example,), split_spec=cuts)
        mine = made.get_stage_module(rank.number)
        if not patch_first:  # a graph has no classes that would tell what its parameters are for
            enable_fp8_gemm(mine, example_inputs=example)
        assert sum(isinstance(parameter, FP8Weight) for parameter in mine.parameters()) == 2
        run(rank, made.build_stage(rank.number, rank.device))


@pytest.mark.parametrize("case", cases.all(), ids=str)
def test_pipeline(case: Case, world: int, backend: str) -> None:
    case.check(world, backend)
