"""Compiling kernels and quantizing weights before the first request instead of during it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..engines import ENGINES, PackedWeight
from ..weights import FP8Weight

# The powers of two by which kernels are chosen, up to a prefill of moderate length.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@torch.no_grad()
def warmup(model: nn.Module, tokens: Iterable[int] = TOKENS) -> int:
    """Runs every kind of FP8 weight of ``model`` once per M in ``tokens``, on zeros; returns the number of products.

    Weights with the same shape, scales, dtypes, device and presence of a bias are of one kind. Weights that are not yet
    quantized are quantized. Call it before capturing a CUDA graph and before ``torch.compile``. It needs memory for the
    largest M; for a stack of experts, tokens are distributed evenly.

    Raises:
        ValueError: an M is below 1.
        UnsupportedError: as at a layer's first call.

    Example:
        >>> from fp8gemm import enable_fp8_gemm
        >>> warmup(enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))), tokens=[1, 16])
        4
    """
    sizes = sorted(set(tokens))
    if sizes and sizes[0] < 1:
        raise ValueError(f"tokens must be at least 1, found {sizes[0]}")
    seen: set[object] = set()
    products = 0
    for module in model.modules():
        for parameter in module._parameters.values():
            if not isinstance(parameter, FP8Weight) or parameter.is_meta:
                continue
            form = parameter._home.form(parameter.dtype)
            assert form is not None
            bias = module._parameters.get("bias") if isinstance(module, nn.Linear) else None
            dtype = form.dtype_for(parameter.dtype)
            kind = (form.engine, form.scheme, form.n, form.k, form.experts, form.device, dtype, bias is None)
            if kind in seen:
                continue
            seen.add(kind)
            for m in sizes:
                _run(form, bias, m, dtype)
                products += 1
    return products


def _run(form: PackedWeight, bias: torch.Tensor | None, m: int, dtype: torch.dtype) -> None:
    engine = ENGINES[form.engine]
    x = torch.zeros(m, form.k, dtype=dtype, device=form.device)
    if form.experts:
        expert = torch.arange(1, form.experts + 1, dtype=torch.int64, device=form.device)
        ends = (expert * m // form.experts).to(torch.int32)
        engine.grouped(x, form, ends, None, dtype)
    else:
        engine.linear(x, form, bias, dtype)
