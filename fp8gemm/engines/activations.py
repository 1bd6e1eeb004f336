"""Quantizing activations before a library's product: by fp8gemm's Triton kernels on a GPU that runs them, else by
torch's operations.

Both round alike, bit for bit, and keep NaN, which vLLM's quantization turns into 448.
"""

from __future__ import annotations

from functools import cache

import torch

from ..numerics import block_scale, quantize
from ..scaled import GROUP_128, ROW, TENSOR, Granularity, ScaledTensor, ScaleFormat
from .padding import padded

# cuBLASLt's block products take multiples of 4 tokens (vllm#49932), and so did vLLM's on Hopper up to 0.23.
TOKENS_TOGETHER = 4


def quantize_tokens(
    x: torch.Tensor,
    granularity: Granularity,
    *,
    static: torch.Tensor | None = None,
    scale_format: ScaleFormat = "float32",
    multiple: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [M, K]`` with unit stride along K to contiguous e4m3 ``[M, K]`` and its float32 scales.

    The scales are ``[M, 1]`` for rows, ``[1, 1]`` for a tensor and wherever ``static`` is given, and for groups of 128
    features ``[M, K / 128]`` with strides (1, M rounded up to 4): M-major, as cuBLASLt, CUTLASS and DeepGEMM read them.

    Args:
        multiple: for groups, M is rounded up to a multiple of it in both results; rows past M are undefined, and
            affect only their own rows of a product.
    """
    if granularity == TENSOR and static is None:
        static = block_scale(x, TENSOR, scale_format=scale_format)
    if fused(x.device):
        from .triton.kernels.quantize import Rounding, quantize_groups, quantize_rows

        rounding = Rounding(static=static, ue8m0=scale_format == "ue8m0")
        block = granularity == GROUP_128
        pair: tuple[torch.Tensor, torch.Tensor] = (
            quantize_groups(x, rounding, multiple=multiple) if block else quantize_rows(x, rounding)
        )
        return pair
    rounded = quantize(x, granularity if static is None else TENSOR, scale=static, scale_format=scale_format)
    if granularity == GROUP_128:
        return padded(rounded.data, multiple, 1), group_scales(rounded.scale, multiple)
    return rounded.data, rounded.scale


def group_scales(scale: torch.Tensor, multiple: int = 1) -> torch.Tensor:
    """Scales ``[M, K / 128]``, M-major with M rounded up to 4, and M to ``multiple``; no copy if they are that."""
    m, groups = scale.shape
    pitch = m + -m % 4
    if m % multiple == 0 and scale.stride() == (1, pitch):
        return scale
    found = scale.new_zeros(groups, pitch).t()
    found[:m] = scale
    return found[: m + -m % multiple]


@cache
def fused(device: torch.device) -> bool:
    """Whether fp8gemm's kernels quantize on this device, and as torch's operations do; runs them once to see."""
    from .triton.engine import OLDEST_TRITON, installed

    triton = installed()
    if device.type != "cuda" or triton is None or triton.version < OLDEST_TRITON:
        return False
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    from .triton.kernels.quantize import quantize_groups, quantize_rows

    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(5, 300, generator=generator, dtype=torch.float32, device="cpu").to(device)
    x[0], x[1, 0], x[2, 0] = 0, float("nan"), float("inf")
    try:
        return all(
            _alike(by_kernel(x), quantize(x, granularity))
            for by_kernel, granularity in ((quantize_rows, ROW), (quantize_groups, GROUP_128))
        )
    except Exception:  # whatever Triton, its compiler or the driver may raise
        return False


def _alike(found: tuple[torch.Tensor, torch.Tensor], expected: ScaledTensor) -> bool:
    """Whether scales are equal, and codes too except for the sign of NaN, which torch takes from its input."""
    codes = [codes.float().nan_to_num(nan=1e9) for codes in (found[0], expected.data)]
    return found[1].equal(expected.scale) and codes[0].equal(codes[1])
