"""From a dense weight, or a stack of them, to FP8 bytes, and from those to the layout of an engine."""

from __future__ import annotations

import torch

from ..engines import MatmulSpec, Prepared, prepare, probe
from ..numerics import quantize_weight
from ..scaled import FP8GemmOptions, ScaledTensor, Scheme


def quantized(weight: torch.Tensor, options: FP8GemmOptions, device: torch.device) -> ScaledTensor:
    """A dense weight, or stack, in FP8 as the options ask, on ``device``."""
    scheme = options.resolved_scheme

    def one(w: torch.Tensor) -> ScaledTensor:
        return quantize_weight(
            w, scheme.weight, dtype=options.weight_dtype, scale_format=scheme.scale_format, device=device
        )

    w = weight.detach()
    if w.dim() == 2:
        return one(w)
    data = torch.empty(w.shape, dtype=options.weight_dtype, device=device)
    scale = torch.empty(scheme.weight.scale_shape(w.shape), dtype=torch.float32, device=device)
    for expert in range(w.shape[0]):
        scaled = one(w[expert])
        data[expert], scale[expert] = scaled.data, scaled.scale
    return ScaledTensor(data, scale, scheme.weight)


def prepare_for(
    weight: ScaledTensor,
    options: FP8GemmOptions,
    compute_dtype: torch.dtype,
    input_scale: torch.Tensor | None,
    scheme: Scheme | None = None,
) -> Prepared:
    """The weight, or stack, in the layout of the engine that is chosen for it on its device."""
    scheme = options.resolved_scheme if scheme is None else scheme
    *stack, n, k = weight.shape
    spec = MatmulSpec(
        scheme=scheme,
        n=n,
        k=k,
        compute_dtype=compute_dtype,
        weight_dtype=weight.data.dtype,
        experts=stack[0] if stack else 0,
        accumulate=options.accumulate,
    )
    return prepare(weight, spec, probe(weight.device), options.engine, input_scale=input_scale)
