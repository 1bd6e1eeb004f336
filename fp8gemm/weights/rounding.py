"""Quantizing a weight again after a write: only blocks that changed, with a warning if most of a change was lost."""

from __future__ import annotations

import warnings

import torch

from ..numerics import block_amax, block_scale, dequantize, expand_scale, quantize, round_stochastically
from ..scaled import FP8GemmOptions, ScaledTensor, Scheme

MOST_LOST = 0.1  # the largest share of a change, by its norm, that may be lost without a warning

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def rounded_again(
    before: ScaledTensor, w: torch.Tensor, options: FP8GemmOptions, scheme: Scheme
) -> tuple[ScaledTensor, float]:
    """New bytes and scales for ``w [(E,) N, K]``, the values of ``before`` after a write, and the share that was lost.

    Blocks of unchanged values keep their bytes and scale. The share of the change that was lost to rounding is
    ``1 - <kept, wanted> / <wanted, wanted>``; 0 if nothing was.
    """
    if before.data.dim() == 2:
        new, kept, wanted = _rounded_matrix(before, w, options, scheme)
        return new, _lost(kept, wanted)
    data, scale = before.data.view(torch.uint8).clone(), before.scale.clone()
    kept = wanted = 0.0
    for expert in range(before.shape[0]):  # one by one, as the temporaries are several times the size of their input
        old = ScaledTensor(before.data[expert], before.scale[expert], before.granularity)
        new, kept_here, wanted_here = _rounded_matrix(old, w[expert], options, scheme)
        data[expert], scale[expert] = new.data.view(torch.uint8), new.scale
        kept, wanted = kept + kept_here, wanted + wanted_here
    return ScaledTensor(data.view(before.data.dtype), scale, before.granularity), _lost(kept, wanted)


def _rounded_matrix(
    before: ScaledTensor, w: torch.Tensor, options: FP8GemmOptions, scheme: Scheme
) -> tuple[ScaledTensor, float, float]:
    """The same for one matrix, with ``<kept, wanted>`` and ``<wanted, wanted>`` instead of the share."""
    grid, shape = before.granularity, before.shape
    was = dequantize(before, w.dtype)
    integer = _INTEGERS[w.dtype.itemsize]
    # Compared as integers, so that a NaN equals itself.
    touched = block_amax((was.view(integer) != w.contiguous().view(integer)).to(torch.float32), grid) > 0
    if options.rounding == "stochastic":
        w32 = w.to(torch.float32)
        scale = block_scale(w32, grid, dtype=before.data.dtype, scale_format=scheme.scale_format)
        data = round_stochastically(w32 / expand_scale(scale, grid, shape), before.data.dtype, options.generator)
        new = ScaledTensor(data, scale, grid)
    else:
        new = quantize(w, grid, dtype=before.data.dtype, scale_format=scheme.scale_format)
    inside = expand_scale(touched.to(torch.float32), grid, shape) > 0
    data = torch.where(inside, new.data.view(torch.uint8), before.data.view(torch.uint8)).view(before.data.dtype)
    result = ScaledTensor(data, torch.where(touched, new.scale, before.scale), grid)
    return result, *_change(was, w, result, stochastic=options.rounding == "stochastic")


def _change(was: torch.Tensor, w: torch.Tensor, found: ScaledTensor, *, stochastic: bool) -> tuple[float, float]:
    if stochastic or was.is_meta or type(was) is not torch.Tensor:  # stochastic rounding loses nothing on average
        return 0.0, 0.0
    wanted = (w.to(torch.float32) - was.to(torch.float32)).nan_to_num_(0.0, 0.0, 0.0)
    kept = (dequantize(found) - was.to(torch.float32)).nan_to_num_(0.0, 0.0, 0.0)
    return float((kept * wanted).sum()), float((wanted * wanted).sum())


def _lost(kept: float, wanted: float) -> float:
    return 0.0 if wanted == 0 else max(0.0, 1 - kept / wanted)


_warned: set[str] = set()


def warn_of_loss(lost: float, size: tuple[int, ...]) -> None:
    """Warns, once in a process, of a write that lost more than a tenth to rounding to FP8."""
    if lost <= MOST_LOST or _warned:
        return
    _warned.add("loss")
    warnings.warn(
        f"{lost:.0%} of what was just written to an FP8 weight {list(size)} was lost to rounding, because it is "
        "small compared with the weight. FP8GemmOptions(fp16_weight_storage='keep') writes to the original instead, "
        "FP8GemmOptions(rounding='stochastic') keeps such changes on average, and disable_fp8_gemm(model) before "
        "merging loses nothing",
        stacklevel=2,
    )
