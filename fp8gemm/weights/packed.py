"""Quantizing dense values to FP8, and packing the result for an engine."""

from __future__ import annotations

from typing import Any

import torch

from ..engines import MatmulSpec, PackedWeight, prepare, probe
from ..scaled import FP8GemmOptions, ScaledTensor, Scheme
from .quantization import quantize_weight, searched_scale
from .search import Search


def quantized(
    w: torch.Tensor, options: FP8GemmOptions, scheme: Scheme, device: torch.device, search: Search | None = None
) -> ScaledTensor:
    """Dense values ``[N, K]``, or a stack ``[E, N, K]``, quantized as the options say, on ``device``.

    A stack and its matrices one by one give the same bits. ``search`` finds better scales than the largest values'.
    """
    searches = search is not None and search.method == "scales" and w.device.type != "meta"
    moments = None if search is None or search.importance is None else search.importance.to(device)

    def one(matrix: torch.Tensor, expert: int = 0) -> ScaledTensor:
        form: dict[str, Any] = {"dtype": options.weight_dtype, "scale_format": scheme.scale_format, "device": device}
        importance = moments[expert] if moments is not None and moments.dim() == 2 else moments
        scale = searched_scale(matrix, scheme.weight, importance=importance, **form) if searches else None
        return quantize_weight(matrix, scheme.weight, scale=scale, **form)

    w = w.detach()
    if search is not None and search.weight is not None:
        return search.weight
    if w.dim() == 2:
        return one(w)
    data = torch.empty(w.shape, dtype=options.weight_dtype, device=device)
    scale = torch.empty(scheme.weight.scale_shape(w.shape), dtype=torch.float32, device=device)
    for expert in range(w.shape[0]):
        scaled = one(w[expert], expert)
        data[expert], scale[expert] = scaled.data, scaled.scale
    return ScaledTensor(data, scale, scheme.weight)


def spec_of(shape: tuple[int, ...], options: FP8GemmOptions, scheme: Scheme, compute_dtype: torch.dtype) -> MatmulSpec:
    """The specification given to engines for a weight ``[N, K]`` or a stack ``[E, N, K]``, in planning and running."""
    *stack, n, k = shape
    return MatmulSpec(
        scheme=scheme,
        n=n,
        k=k,
        compute_dtype=compute_dtype,
        weight_dtype=options.weight_dtype,
        experts=stack[0] if stack else 0,
        accumulate=options.accumulate,
    )


def prepare_for(
    weight: ScaledTensor,
    options: FP8GemmOptions,
    compute_dtype: torch.dtype,
    input_scale: torch.Tensor | None,
    scheme: Scheme,
) -> PackedWeight:
    """The weight, or stack, packed by the engine that is chosen for it on its device."""
    spec = spec_of(tuple(weight.shape), options, scheme, compute_dtype)
    return prepare(weight, spec, probe(weight.device), options.engine, input_scale=input_scale)
