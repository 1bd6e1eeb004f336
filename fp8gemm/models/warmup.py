"""Kernels compiled and weights quantized before the first request instead of in it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..engines import ENGINES, Prepared
from ..weights.experts import FP8Experts
from ..weights.holder import FP8Holder
from ..weights.linear import FP8Linear

# The powers of two that kernels are chosen by, up to a prefill of some length.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@torch.no_grad()
def warmup(model: nn.Module, tokens: Iterable[int] = TOKENS) -> int:
    """Runs every kind of FP8 layer of ``model`` once for each M in ``tokens``, on zeros; how many products that were.

    Layers that share shape, scales, dtypes, device and bias are one kind. Weights that are not quantized yet are.
    Call it before a CUDA graph is captured and before ``torch.compile``. Takes memory for the largest M; over a stack
    of experts tokens are spread evenly.

    Raises:
        ValueError: an M is below 1.
        UnsupportedError: as at a layer's first call.
    """
    sizes = sorted(set(tokens))
    if sizes and sizes[0] < 1:
        raise ValueError(f"tokens must be at least 1, found {sizes[0]}")
    seen: set[object] = set()
    products = 0
    for layer in model.modules():
        if not isinstance(layer, FP8Holder) or layer.device.type == "meta":
            continue
        layer.materialize_fp8_weight()
        weight = layer._current(layer.device)
        bias = layer.bias if isinstance(layer, FP8Linear) else None
        dtype = layer.compute_dtype if layer.compute_dtype in weight.dtypes else weight.dtypes[0]
        kind = (weight.engine, weight.scheme, weight.n, weight.k, weight.experts, weight.device, dtype, bias is None)
        if kind in seen:
            continue
        seen.add(kind)
        for m in sizes:
            _run(layer, weight, bias, m, dtype)
            products += 1
    return products


def _run(layer: FP8Holder, weight: Prepared, bias: torch.Tensor | None, m: int, dtype: torch.dtype) -> None:
    engine = ENGINES[weight.engine]
    x = torch.zeros(m, weight.k, dtype=dtype, device=weight.device)
    if isinstance(layer, FP8Experts):
        expert = torch.arange(1, weight.experts + 1, dtype=torch.int64, device=weight.device)
        ends = (expert * m // weight.experts).to(torch.int32)
        engine.grouped(x, weight, ends, None, dtype)
    else:
        engine.linear(x, weight, bias, dtype)
