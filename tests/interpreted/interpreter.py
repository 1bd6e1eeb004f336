"""Triton's interpreter with the hardware's float conversions, so that kernels can be compared bit for bit.

The interpreter of Triton 3.6 rounds to FP8 half up and drops the carry into the exponent (one step wrong in 2.5 % of
elements), reads the NaN codes of e4m3 as 480, truncates to bfloat16, and multiplies bfloat16 as if it were integers. A
GPU rounds to nearest, ties to even, saturates finite values (``cvt.rn.satfinite``) and keeps NaN. Importing this
module replaces those conversions.
"""

from __future__ import annotations

import numpy
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

_TORCH = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_STORED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _convert(builder: object, source: TensorHandle, to: tl.dtype, *rest: object) -> TensorHandle:
    """Converts between float dtypes, rounding like torch and the hardware."""
    value, want = _value(source), _TORCH[to.scalar]
    if want == torch.float8_e4m3fn:
        value = torch.where(value.isnan(), value, value.float().clamp(-448.0, 448.0))
    raw = value.to(want).view(_STORED[want.itemsize]).numpy()
    return TensorHandle(raw.view(_get_np_dtype(to)), to.scalar)


def _value(source: TensorHandle) -> torch.Tensor:
    have = _TORCH[source.dtype.scalar]
    return torch.from_numpy(numpy.array(source.data).view(f"int{8 * have.itemsize}")).view(have)


def _dot(
    builder: object, a: TensorHandle, b: TensorHandle, total: TensorHandle, precision: object, imprecise: object
) -> TensorHandle:
    product = torch.matmul(_value(a).float(), _value(b).float())
    return TensorHandle(product.numpy() + total.data, total.dtype.scalar)


_multiply = InterpreterBuilder.create_fmul


def _fmul(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle) -> TensorHandle:
    if a.dtype.scalar != tl.bfloat16:
        return _multiply(builder, a, b)
    product = TensorHandle((_value(a).float() * _value(b).float()).numpy(), tl.float32)
    return _convert(builder, product, tl.bfloat16)


_cast = InterpreterBuilder.cast_impl


def _cast_impl(builder: InterpreterBuilder, source: TensorHandle, to: tl.dtype) -> TensorHandle:
    if source.dtype.scalar in _TORCH and to.scalar in _TORCH:
        return _convert(builder, source, to)
    return _cast(builder, source, to)


def _fma(builder: object, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """Float32 multiply-add with a single rounding: float64 represents the product exactly."""
    wide = x.data.astype(numpy.float64) * y.data.astype(numpy.float64) + z.data.astype(numpy.float64)
    return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


InterpreterBuilder.create_fp_to_fp = _convert
InterpreterBuilder.create_fma = _fma
InterpreterBuilder.cast_impl = _cast_impl
InterpreterBuilder.create_dot = _dot
InterpreterBuilder.create_fmul = _fmul
