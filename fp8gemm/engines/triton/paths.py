"""Running a plan: a Triton kernel with the plan's tiles, or a quantization kernel followed by torch's product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..activations import TOKENS_TOGETHER
from ..base import PackedWeight
from . import library
from .plan import INLINE_UP_TO, Kind, PathName, Place, Plan

if TYPE_CHECKING:
    from .kernels.quantize import Rounding


@dataclass(frozen=True, kw_only=True)
class Product:
    """One call of ``linear`` with its plan.

    ``x [M, K]`` is floating point, or e4m3 with ``x_scale``: ``[M, 1]``, ``[1, 1]``, or for block scales ``[M, K /
    128]`` stored M-major. Both may have rows past ``m``.
    """

    m: int
    x: torch.Tensor
    weight: PackedWeight
    bias: torch.Tensor | None
    out_dtype: torch.dtype
    plan: Plan
    where: Place
    x_scale: torch.Tensor | None = None

    @property
    def operands(self) -> tuple[torch.Tensor, PackedWeight, torch.Tensor | None, torch.dtype]:
        return self.x, self.weight, self.bias, self.out_dtype

    def quantized(self, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
        """The activations in e4m3, and their scales."""
        if self.x_scale is not None:
            return self.x, self.x_scale
        return quantize(self.x, self.weight, kind, library=self.plan.path == "library")


def quantize(
    x: torch.Tensor, weight: PackedWeight, kind: Kind, *, up: torch.Tensor | None = None, library: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [M, K]``, or ``silu(x) * up``, quantized as products of this kind need it.

    The scales are one per row, the static scale, or one per 128 features. ``library`` gives them the shape that torch's
    products need: M a multiple of 4 for groups, and a static scale for each row unless the weight has one scale too.
    """
    from .kernels import quantize as kernels

    ue8m0 = weight.scheme.scale_format == "ue8m0"
    if kind == "block":
        return kernels.quantize_groups(x, _rounding(None, ue8m0), up=up, multiple=TOKENS_TOGETHER if library else 1)
    static = weight.input_scale if weight.scheme.static else None
    repeated = library and weight.scale.numel() > 1
    return kernels.quantize_rows(x, _rounding(static, ue8m0), up=up, repeated=repeated)


def _rounding(static: torch.Tensor | None, ue8m0: bool) -> Rounding:
    from .kernels import quantize as kernels

    return kernels.PLAIN if static is None and not ue8m0 else kernels.Rounding(static=static, ue8m0=ue8m0)


def _vectors(product: Product) -> torch.Tensor:
    from .kernels import w8a16

    x, weight, bias, out_dtype = product.operands
    return w8a16.multiply_vectors(x, weight, bias, out_dtype, native=product.where.native, **product.plan.tiles)


def _tokens(product: Product) -> torch.Tensor:
    from .kernels import w8a16

    x, weight, bias, out_dtype = product.operands
    return w8a16.multiply_tokens(x, weight, bias, out_dtype, native=product.where.native, **product.plan.tiles)


def _rows(product: Product) -> torch.Tensor:
    from .kernels import row

    _, weight, bias, out_dtype = product.operands
    return row.multiply_rows(
        *product.quantized("row"),
        weight,
        bias,
        out_dtype,
        promotion="none" if weight.fast else product.where.promotion,
        weight_first=product.where.weight_first,
        programs=product.where.multiprocessors,
        **product.plan.tiles,
    )


def _blocks(product: Product) -> torch.Tensor:
    from .kernels import block

    x, weight, bias, out_dtype = product.operands
    x_scale = product.x_scale
    if x_scale is None and x.shape[0] > INLINE_UP_TO:
        x, x_scale = product.quantized("block")
    return block.multiply_blocks(
        x,
        x_scale,
        weight,
        bias,
        out_dtype,
        ue8m0=weight.scheme.scale_format == "ue8m0",
        weight_first=product.where.weight_first,
        **product.plan.tiles,
    )


def _library(product: Product) -> torch.Tensor:
    _, weight, bias, out_dtype = product.operands
    if weight.scheme.weight.cols is not None:
        quantized = product.quantized("block")
        return library.multiply_blocks(*quantized, weight, bias, out_dtype, product.m)
    return library.multiply_rows(*product.quantized("row"), weight, bias, out_dtype)


def _dense(product: Product) -> torch.Tensor:
    from . import replay
    from .kernels import w8a16

    x, weight, bias, out_dtype = product.operands
    w = w8a16.dense(weight, x.dtype, native=product.where.native)
    y: torch.Tensor = replay.call(F.linear, x, w, None if bias is None else bias.to(x.dtype))
    return y.to(out_dtype)


PATHS: dict[PathName, Callable[[Product], torch.Tensor]] = {
    "vectors": _vectors,
    "tokens": _tokens,
    "rows": _rows,
    "blocks": _blocks,
    "library": _library,
    "dense": _dense,
}
