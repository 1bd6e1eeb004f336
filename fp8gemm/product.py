"""One product by a prepared weight: a plain call in eager, one opaque op while compiling, gradients to x and bias."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .engines import ENGINES, Prepared, restore
from .quantize import dequantize
from .scaled import Granularity, Scheme


def multiply(x: torch.Tensor, weight: Prepared, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """``y [M, N] = x [M, K] @ w.T + bias [N]``, differentiable in ``x`` and ``bias``; the weight is frozen."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: torch.Tensor = _Product.apply(x, bias, weight, out_dtype)  # type: ignore[no-untyped-call]
        return y
    return _forward(x, weight, bias, out_dtype)


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
    if engine.traceable or not torch.compiler.is_compiling():
        return engine.linear(x, weight, bias, out_dtype)
    y: torch.Tensor = torch.ops.fp8gemm.linear(
        x,
        weight.data,
        weight.scale,
        weight.input_scale,
        list(weight.extra),
        bias,
        weight.n,
        weight.k,
        weight.engine,
        _encode(weight.scheme),
        out_dtype,
    )
    return y


@torch.library.custom_op("fp8gemm::linear", mutates_args=())
def _linear_op(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    extra: list[torch.Tensor],
    bias: torch.Tensor | None,
    n: int,
    k: int,
    engine: str,
    scheme: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    weight = Prepared(
        engine=engine,
        scheme=_decode(scheme),
        n=n,
        k=k,
        data=data,
        scale=scale,
        input_scale=input_scale,
        extra=tuple(extra),
    )
    return ENGINES[engine].linear(x, weight, bias, out_dtype).contiguous()


@_linear_op.register_fake
def _(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    extra: list[torch.Tensor],
    bias: torch.Tensor | None,
    n: int,
    k: int,
    engine: str,
    scheme: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], n, dtype=out_dtype)


def _encode(scheme: Scheme) -> str:
    """A scheme as text, the only form in which an op's schema can carry it."""
    sizes = [scheme.weight, scheme.activation] if scheme.activation is not None else [scheme.weight]
    grids = ";".join(f"{grid.rows or 0},{grid.cols or 0}" for grid in sizes)
    return f"{grids}|{int(scheme.static)}|{scheme.scale_format}"


@cache
def _decode(text: str) -> Scheme:
    grids, static, scale_format = text.split("|")
    sizes = [Granularity(*(int(size) or None for size in grid.split(","))) for grid in grids.split(";")]
    return Scheme(
        weight=sizes[0],
        activation=sizes[1] if len(sizes) > 1 else None,
        static=static == "1",
        scale_format="ue8m0" if scale_format == "ue8m0" else "float32",
    )
