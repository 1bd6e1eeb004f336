"""Compiling kernels and quantizing weights before the first request instead of during it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..engines import ENGINES, PackedWeight
from ..errors import UnsupportedError
from ..weights import FP8Linear, FP8Weight
from ..weights.sharding import held
from .gated import last_layer
from .siblings import SiblingLinear, join, joined_bias

# The powers of two by which kernels are chosen, up to a prefill of moderate length.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@torch.no_grad()
def warmup(model: nn.Module, tokens: Iterable[int] = TOKENS) -> int:
    """Runs every kind of FP8 weight of ``model`` once per M in ``tokens``, on zeros; returns the number of products.

    Weights with the same shape, scales, dtypes, device and presence of a bias are of one kind. So are the products of
    fused siblings, and of gated MLPs where the engine fuses their activation function. Weights that are not yet
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
    for form, bias, dtype, gated in _forms(model):
        kind = (form.engine, form.scheme, form.n, form.k, form.experts, form.device, dtype, bias is None, gated)
        if kind in seen:
            continue
        seen.add(kind)
        for m in sizes:
            products += _run(form, bias, m, dtype, gated)
    return products


def _forms(model: nn.Module) -> Iterator[tuple[PackedWeight, torch.Tensor | None, torch.dtype, bool]]:
    """Every packed weight of the model with its bias and dtype, and whether it takes gate and up."""
    joined = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            weight = held(parameter)
            if not isinstance(weight, FP8Weight) or weight.is_meta:
                continue
            form = weight._home.form(weight.dtype)
            assert form is not None
            bias = held(module._parameters.get("bias")) if isinstance(module, nn.Linear) else None
            yield form, bias, form.dtype_for(weight.dtype), False
        last = last_layer(module)
        if last is not None and not last.home.is_meta:
            form = last.form(last.device)
            yield form, held(last.bias), form.dtype_for(last.compute_dtype), True
        group = module.group if isinstance(module, SiblingLinear) else None
        alike = None if group is None else tuple(map(_appearance, group.members))
        if group is not None and alike not in joined:  # joining copies all bytes
            joined.add(alike)
            layer = _together(group.members)
            if layer is not None:
                form = layer.form(layer.device)
                yield form, layer.bias, form.dtype_for(layer.compute_dtype), False


def _appearance(member: FP8Linear) -> tuple[object, ...]:
    """What decides, with its siblings', which products their fused layer runs."""
    kind = (member.options, member.scheme, member.weight_shape, member.device, member.compute_dtype)
    return (*kind, member.bias is None)


def _together(members: list[FP8Linear]) -> FP8Linear | None:
    """The fused layer that these siblings will become if they receive the same tensor; None if they cannot."""
    if any(member.home.is_meta for member in members):
        return None
    try:
        layer = join(members)
    except UnsupportedError:
        return None
    bias = joined_bias(members)
    layer._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def _run(form: PackedWeight, bias: torch.Tensor | None, m: int, dtype: torch.dtype, gated: bool) -> int:
    """Runs one product; returns the number of products, which is 0 where an engine does not fuse a gate."""
    engine = ENGINES[form.engine]
    x = torch.zeros(m, form.k, dtype=dtype, device=form.device)
    if gated:
        return int(engine.gated(x, x, form, bias, dtype) is not None)
    if form.experts:
        expert = torch.arange(1, form.experts + 1, dtype=torch.int64, device=form.device)
        ends = (expert * m // form.experts).to(torch.int32)
        engine.grouped(x, form, ends, None, dtype)
    else:
        engine.linear(x, form, bias, dtype)
    return 1
