"""One product by a prepared weight: a plain call in eager, an op where somebody watches, gradients to x and bias.

An op is what torch.compile, torch.jit.trace, dispatch modes and tensor subclasses can see; C only sees plain memory.
While compiling activations are rounded outside of the op wherever the engine rounds them apart from its product.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from torch.autograd import forward_ad

from .. import native
from ..engines import ENGINES, Prepared, restore
from ..numerics import dequantize, quantize
from ..scaled import Accumulate, Granularity, ScaledTensor, Scheme


def multiply(x: torch.Tensor, weight: Prepared, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """``y [M, N] = x [M, K] @ w.T + bias [N]``, differentiable in ``x`` and ``bias``; the weight is frozen."""
    if wants_derivative(x, bias):
        y: torch.Tensor = _Product.apply(x, bias, weight, out_dtype)  # type: ignore[no-untyped-call]
        return y
    return _forward(x, weight, bias, out_dtype)


def wants_derivative(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether autograd has to see a product; inside ``forward_ad.dual_level`` it then says that it cannot."""
    backwards = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    return backwards or forward_ad._current_level >= 0


def dense(weight: Prepared, dtype: torch.dtype) -> torch.Tensor:
    """The weight ``[N, K]``, or stack, dequantized in float32 and rounded once to ``dtype``."""
    return dequantize(restore(weight), dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, weight: Prepared, out_dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.weight, ctx.x_dtype = weight, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(x, weight, bias, out_dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, y_grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (y_grad.to(ctx.x_dtype) @ dense(ctx.weight, ctx.x_dtype)).to(ctx.x_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[1]:
            bias_grad = y_grad.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return x_grad, bias_grad, None, None


def _forward(x: torch.Tensor, weight: Prepared, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    engine = ENGINES[weight.engine]
    compiling = torch.compiler.is_compiling()
    watched = compiling or jit_tracing() or not native.plain(x, weight.data, weight.scale, bias)
    if engine.traceable or not watched:
        return engine.linear(x, weight, bias, out_dtype)
    rounding = weight.apart if compiling and _more_than(x.shape[0], weight.few) else None
    x_scale = None
    if rounding is not None:  # as plain operations, which the compiler fuses with those before them
        static = weight.input_scale if weight.scheme.static else None
        rounded = quantize(x, rounding, scale=static, scale_format=weight.scheme.scale_format)
        x, x_scale = rounded.data, rounded.scale
    # What is derived from the bytes would be a constant of an exported program, and stale once other bytes are loaded.
    derive = len(weight.extra) > 0 and _exporting()
    rounded_as = _encode_grid(rounding) if rounding else ""
    y: torch.Tensor = torch.ops.fp8gemm.linear(
        x,
        x_scale,
        weight.data,
        weight.scale,
        weight.input_scale,
        [] if derive else list(weight.extra),
        bias,
        [weight.n, weight.k],
        "/".join((weight.engine, weight.accumulate, _encode(weight.scheme), rounded_as, "derive" if derive else "")),
        out_dtype,
    )
    return y


def _exporting() -> bool:
    """The flag behind ``torch.compiler.is_exporting()``, which torch 2.10's Dynamo takes for true in every trace."""
    return torch.compiler._is_exporting_flag


def _more_than(m: int, few: int) -> bool:
    """Whether there are more than ``few`` tokens.

    Where their number is symbolic that is a guard, and a no where there can be none. An exported program has one graph,
    in which the engine decides when it runs, unless it decides alike for all.
    """
    if _exporting():
        return few == 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # a slow import, and torch.compile has made it

    return bool(guard_or_false(m > few))


@torch.library.custom_op("fp8gemm::linear", mutates_args=())
def _linear_op(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    data: torch.Tensor,
    scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    extra: list[torch.Tensor],
    bias: torch.Tensor | None,
    shape: list[int],
    how: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``Engine.linear``, or ``linear_quantized`` where ``x`` comes with scales.

    ``shape`` is (n, k); ``how`` is the engine, its accumulation, the scheme, the granularity of ``x_scale``, and
    whether ``extra`` is to be derived.
    """
    engine, accumulate, scheme, rounding, derive = how.split("/")
    weight = Prepared(
        engine=engine,
        scheme=_decode(scheme),
        n=shape[0],
        k=shape[1],
        data=data,
        scale=scale,
        input_scale=input_scale,
        extra=tuple(extra),
        accumulate=cast(Accumulate, accumulate),
    )
    if derive:
        prepared = ENGINES[engine].prepare(restore(weight), weight.scheme, input_scale=input_scale)
        weight = replace(prepared, accumulate=weight.accumulate)
    x = x.contiguous()  # a tensor that was zero by decree comes here as one zero, expanded
    if x_scale is None:
        return ENGINES[engine].linear(x, weight, bias, out_dtype).contiguous()
    rounded = ScaledTensor(x, x_scale, _decode_grid(rounding))
    return ENGINES[engine].linear_quantized(rounded, weight, bias, out_dtype).contiguous()


@_linear_op.register_fake
def _(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    data: torch.Tensor,
    scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    extra: list[torch.Tensor],
    bias: torch.Tensor | None,
    shape: list[int],
    how: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], shape[0], dtype=out_dtype)


def jit_tracing() -> bool:
    """Whether torch.jit.trace is recording, to which anything but an op of torch's is a constant."""
    return torch._C._get_tracing_state() is not None


def _encode(scheme: Scheme) -> str:
    """A scheme as text, the only form in which an op's schema can carry it."""
    sizes = [scheme.weight, scheme.activation] if scheme.activation is not None else [scheme.weight]
    return f"{';'.join(map(_encode_grid, sizes))}|{int(scheme.static)}|{scheme.scale_format}"


@cache
def _decode(text: str) -> Scheme:
    grids, static, scale_format = text.split("|")
    sizes = [_decode_grid(grid) for grid in grids.split(";")]
    return Scheme(
        weight=sizes[0],
        activation=sizes[1] if len(sizes) > 1 else None,
        static=static == "1",
        scale_format="ue8m0" if scale_format == "ue8m0" else "float32",
    )


def _encode_grid(grid: Granularity) -> str:
    return f"{grid.rows or 0},{grid.cols or 0}"


def _decode_grid(text: str) -> Granularity:
    return Granularity(*(int(size) or None for size in text.split(",")))
