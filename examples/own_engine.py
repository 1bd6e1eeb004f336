"""A custom engine that dequantizes the weight once and multiplies in float64. Run it to see a layer use it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fp8gemm import (
    FP8GemmOptions,
    MatmulSpec,
    ScaledTensor,
    Scheme,
    dequantize,
    enable_fp8_gemm,
    register_engine,
    report,
)
from fp8gemm.engines import Machine, Prepared
from fp8gemm.engines.base import WeightOnlyEngine


class DenseEngine(WeightOnlyEngine):
    """Multiplies by the dequantized weight, which ``prepare`` stores alongside the FP8 data."""

    name = "dense"

    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        reasons = [] if machine.device == "cpu" else [f"runs on cpu only, found {machine.device}"]
        return reasons + (["does not support stacks"] if spec.experts else [])

    def prepare(self, weight: ScaledTensor, scheme: Scheme, *, input_scale: torch.Tensor | None = None) -> Prepared:
        n, k = weight.shape
        dense = (dequantize(weight, torch.float64),)
        return Prepared(
            engine=self.name, scheme=scheme.weight_only(), n=n, k=k, data=weight.data, scale=weight.scale, extra=dense
        )

    def linear(
        self, x: torch.Tensor, weight: Prepared, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        return F.linear(x.double(), weight.extra[0], None if bias is None else bias.double()).to(out_dtype)


if __name__ == "__main__":
    register_engine(DenseEngine())
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32)), options=FP8GemmOptions(engine="dense"))
    model(torch.randn(3, 64))
    print(report(model))
