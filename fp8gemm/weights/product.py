"""The product of activations with a packed weight: a plain call in eager mode, an operation if anything observes it.

torch.compile, torch.jit.trace, dispatch modes, the profiler and tensor subclasses can only see operations, and C code
needs plain memory. While compiling, activations are quantized outside of the operation if the engine supports that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from ..engines import ENGINES, PackedWeight, restore
from ..numerics import quantize
from .lookup import dequantized
from .onnx import onnx_linear
from .operation import call_grouped, call_linear, counted_by_caller
from .remembered import remembered_linear
from .watching import exporting, exporting_to_onnx, jit_tracing, warn_of_traces, watched


def multiply(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    version: Callable[[], int] | None = None,
) -> torch.Tensor:
    """``y [M, N] = x [M, K] @ w.T + bias [N]``, differentiable in ``x`` and ``bias``; the weight is frozen.

    ``version`` returns the weight's version: backward raises if the weight was written to since forward.
    """
    if wants_derivative(x, bias) and not jit_tracing():
        y: torch.Tensor = _Product.apply(x, bias, weight, out_dtype, version)  # type: ignore[no-untyped-call]
        return y
    return forward(x, weight, bias, out_dtype)


def wants_derivative(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether autograd has to record a product."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is active, so that inputs may have tangents."""
    return forward_ad._current_level >= 0


def dense(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight ``[N, K]``, or stack, dequantized in float32 and rounded once to ``dtype``."""
    return dequantized(restore(weight), dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        weight: PackedWeight,
        out_dtype: torch.dtype,
        version: Callable[[], int] | None,
    ) -> torch.Tensor:
        ctx.weight, ctx.x_dtype, ctx.version = weight, x.dtype, version
        ctx.seen = None if version is None else version()
        ctx.bias_dtype = None if bias is None else bias.dtype
        return forward(x, weight, bias, out_dtype)

    @staticmethod
    def backward(ctx: Any, y_grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        if ctx.version is not None and ctx.version() != ctx.seen:
            raise RuntimeError(
                "an FP8 weight needed for gradient computation has been modified by an inplace operation since forward"
            )
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (y_grad.to(ctx.x_dtype) @ dense(ctx.weight, ctx.x_dtype)).to(ctx.x_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[1]:
            bias_grad = y_grad.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return x_grad, bias_grad, None, None, None


def forward(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """``multiply`` without derivatives."""
    engine = ENGINES[weight.engine]
    compiling = torch.compiler.is_compiling()
    if not compiling and not watched(x, weight.data, weight.scale, bias):
        return remembered_linear(x, weight, bias, out_dtype)
    if compiling and exporting_to_onnx():
        return onnx_linear(x, weight, bias, out_dtype)
    if engine.traceable and not weight.bare:
        return engine.linear(x, weight, bias, out_dtype)
    rounding = weight.apart if compiling and _more_than(x.shape[0], weight.few) else None
    x_scale = None
    if rounding is not None:  # as plain operations, which the compiler can fuse with those before them
        static = weight.input_scale if weight.scheme.static else None
        rounded = quantize(x, rounding, scale=static, scale_format=weight.scheme.scale_format)
        # M-major, as every kernel reads the scales of groups; the compiler stores them that way at no cost.
        x, x_scale = rounded.data, rounded.scale.t().contiguous().t()
    if compiling:
        return call_linear(x, weight, bias, out_dtype, x_scale, rounding)
    return _seen(call_linear, x, weight, bias, out_dtype)


def grouped_forward(x: torch.Tensor, weight: PackedWeight, ends: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """``Engine.grouped`` for a stack, as an operation if anything observes it."""
    if torch.compiler.is_compiling():
        return call_grouped(x, weight, ends, out_dtype)
    if not watched(x, weight.data, weight.scale, ends):
        return ENGINES[weight.engine].grouped(x, weight, ends, None, out_dtype)
    return _seen(call_grouped, x, weight, ends, out_dtype)


def _seen(operation: Callable[..., torch.Tensor], *operands: Any) -> torch.Tensor:
    """An operation outside of a graph, for whoever watches; the caller counts it."""
    warn_of_traces()
    with counted_by_caller():
        return operation(*operands)


def _more_than(m: int, few: int) -> bool:
    """Whether there are more than ``few`` tokens.

    If their number is symbolic, this installs a guard, or returns False if no guard is possible. An exported program
    has only one graph, in which the engine decides at run time, unless it decides alike for every number.
    """
    if exporting():
        return few == 0
    # a slow import, which torch.compile has already done
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(m > few))
