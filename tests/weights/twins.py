"""FP8 weights compared with dense tensors of the same values (their twins)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fp8gemm import FP8GemmOptions, Granularity, Scheme
from fp8gemm.numerics import block_amax, dequantize, expand_scale
from fp8gemm.weights import FP8Linear, FP8Weight

N, K = 40, 48
TILES = Scheme(weight=Granularity(8, 16), activation=None)
GROUPS = Scheme(weight=Granularity(1, 16), activation=None)
SCHEMES = {"row": "weight_only", "tiles": TILES, "groups": GROUPS, "block": "block", "tensor": "tensor"}


def put(w: torch.Tensor, where: Any, value: Any) -> None:
    w[where] = value


def random_like(w: torch.Tensor) -> torch.Tensor:
    return torch.randn(w.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float32).to(w.dtype) * 0.3


def matrix(scheme: str, storage: str = "discard", dtype: torch.dtype = torch.bfloat16) -> FP8Linear:
    options = FP8GemmOptions(scheme=SCHEMES[scheme], fp16_weight_storage=storage)  # type: ignore[arg-type]
    return FP8Linear.convert(nn.Linear(K, N, dtype=dtype), options)


def exact(weight: FP8Weight) -> torch.Tensor:
    """The values to write, in separate memory."""
    original = weight._home.original
    return weight.dequantize() if original is None else original.detach().clone()


def check_write(weight: FP8Weight, write: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    """Writes to a weight and to its dense twin, and compares values, and the bytes of untouched blocks.

    A value is rounded to half a unit of E4M3's three mantissa bits, 2**-4 of it, or to half of its smallest number,
    2**-10 times the scale. Returns the twin.
    """
    before, twin = weight.scaled(), exact(weight)
    turned = weight._home.layout.turned
    was = twin.clone()
    torch.manual_seed(5)
    write(twin)
    torch.manual_seed(5)
    write(weight)
    assert exact(weight).equal(twin)
    after = weight.scaled()
    changed = (was != twin).transpose(-1, -2) if turned else was != twin
    grid = after.granularity
    untouched = block_amax(changed.to(torch.float32), grid) == 0
    assert after.scale[untouched].equal(before.scale[untouched])
    same = expand_scale(untouched.to(torch.float32), grid, after.shape).expand(after.shape) > 0
    assert after.data.view(torch.uint8)[same].equal(before.data.view(torch.uint8)[same])
    found = dequantize(after).transpose(-1, -2) if turned else dequantize(after)
    scale = expand_scale(after.scale, grid, after.shape).expand(after.shape)
    scale = scale.transpose(-1, -2) if turned else scale
    assert ((found - twin).abs() <= twin.abs() * 2**-4 * 1.001 + scale * 2**-10).all()
    return twin


def near(y: torch.Tensor, wanted: torch.Tensor, tolerance: float = 0.05) -> None:
    """The tolerance of products: 4 % of their norm if activations are quantized, else bfloat16's rounding."""
    error = (y.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-6)
    assert error < tolerance
