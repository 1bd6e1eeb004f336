"""The engine as on cards that are not here, and products of tensors without memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from fp8gemm import ScaledTensor, Scheme
from fp8gemm.engines.triton.engine import TritonEngine
from fp8gemm.engines.triton.plan import Place
from fp8gemm.scaled import Accumulate


def engine_on(where: Place) -> TritonEngine:
    """An engine that believes to be on another card."""

    class There(TritonEngine):
        def place(self, device: torch.device) -> Place:
            return where

    return There()


def weight_of(scheme: Scheme, *shape: int) -> ScaledTensor:
    """A weight, or a stack of them, without memory."""
    data = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
    return ScaledTensor(data, torch.empty(scheme.weight.scale_shape(shape), device="meta"), scheme.weight)


def linear(
    engine: TritonEngine,
    scheme: Scheme,
    n: int,
    k: int,
    m: int,
    dtype: torch.dtype,
    *,
    bias: bool,
    accumulate: Accumulate = "auto",
) -> None:
    x = torch.empty(m, k, dtype=dtype, device="meta")
    b = torch.empty(n, dtype=dtype, device="meta") if bias else None
    weight = replace(engine.prepare(weight_of(scheme, n, k), scheme), accumulate=accumulate)
    engine.linear(x, weight, b, dtype)


def grouped(
    engine: TritonEngine,
    scheme: Scheme,
    experts: int,
    n: int,
    k: int,
    tokens: int,
    *,
    accumulate: Accumulate = "auto",
) -> None:
    x = torch.empty(tokens, k, dtype=torch.bfloat16, device="meta")
    ends = torch.empty(experts, dtype=torch.int32, device="meta")
    weight = replace(engine.prepare_stack(weight_of(scheme, experts, n, k), scheme), accumulate=accumulate)
    engine.grouped(x, weight, ends, None, torch.bfloat16)
