"""A custom engine that dequantizes the weight once and multiplies in float64. Run it to see a layer use it."""

from __future__ import annotations

import os
from dataclasses import dataclass

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
from fp8gemm.engines import Machine, PackedWeight
from fp8gemm.engines.base import WeightOnlyEngine


@dataclass(frozen=True)
class Memory:
    """What this engine needs to know of a machine; as text for ``fp8gemm doctor``."""

    size: int

    def __str__(self) -> str:
        return f"{self.size / 1e9:.1f} GB of memory"


class DenseEngine(WeightOnlyEngine):
    """Multiplies by the dequantized weight, which ``prepare`` stores alongside the FP8 data."""

    name = "dense"

    def probe(self, device: torch.device, machine: Machine) -> Memory | None:
        return Memory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) if machine.device == "cpu" else None

    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        found, needed = machine.facts(self.name, Memory), Memory(8 * spec.n * spec.k)
        if found is None:
            return [f"runs on cpu only, found {machine.device}"]
        reasons = [] if needed.size < found.size else [f"needs {needed}, found {found}"]
        return reasons + (["does not support stacks"] if spec.experts else [])

    def prepare(self, weight: ScaledTensor, scheme: Scheme, *, input_scale: torch.Tensor | None = None) -> PackedWeight:
        n, k = weight.shape
        extra = {"dense": dequantize(weight, torch.float64)}
        return PackedWeight(
            engine=self.name, scheme=scheme.weight_only(), n=n, k=k, data=weight.data, scale=weight.scale, extra=extra
        )

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        return F.linear(x.double(), weight.extra["dense"], None if bias is None else bias.double()).to(out_dtype)


if __name__ == "__main__":
    register_engine(DenseEngine())
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32)), options=FP8GemmOptions(engine="dense"))
    model(torch.randn(3, 64))
    print(report(model))
