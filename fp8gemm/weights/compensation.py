"""Error-compensated rounding of a weight (GPTQ, Frantar et al. 2022, https://arxiv.org/abs/2210.17323).

Columns are rounded one after the other, and what rounding does to the output on the calibration inputs is pushed onto
the columns that are still to be rounded. The result is an ordinary FP8 weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UnsupportedError
from ..numerics import dequantize, expand_scale, nearest_value
from ..scaled import Granularity, ScaledTensor

_PART_ELEMENTS = 2**22  # elements of one part: enough rows that a step, which does one column of them, is not too short
_COLUMNS = 128  # columns whose errors reach those after them in one product
_DAMPING = 0.01  # of the mean of the diagonal, as in the paper, section 3.3


@dataclass(frozen=True)
class Compensated:
    """A rounded weight, and how many of its groups of rows with scales of their own kept the plain rounding."""

    weight: ScaledTensor
    plain: int
    groups: int


@torch.no_grad()
def compensated(w: torch.Tensor, scale: torch.Tensor, plain: ScaledTensor, gram: torch.Tensor) -> Compensated:
    """``w [N, K]`` rounded for the least ``sum |x @ (w - q).T|^2`` over inputs with ``gram [K, K] = x.T @ x``.

    Rows share ``scale``, float32 ``granularity.scale_shape(w.shape)``, as in ``plain``, the weight rounded to nearest.
    Groups of rows for which that is better on these very inputs get its bytes and scales.

    Raises:
        UnsupportedError: the matrix of the inputs cannot be decomposed even with strong damping.
    """
    grid, dtype, device = plain.granularity, plain.data.dtype, plain.device
    n, k = w.shape
    gram = gram.to(device, torch.float32)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)  # the columns that matter most come first
    factor = _factor(gram[order][:, order])
    data = torch.empty(n, k, dtype=dtype, device=device)
    for rows in _row_parts(n, k):
        part = w[rows].to(device, torch.float32)
        spread = expand_scale(_scales_of(scale, grid, rows), _by_row(grid), part.shape).expand(part.shape)
        rounded = _rounded(part[:, order].nan_to_num_(0.0, 0.0, 0.0), spread[:, order], factor, dtype)
        codes = torch.empty_like(rounded).index_copy_(1, order, rounded)
        data[rows] = torch.where(torch.isfinite(part), codes, torch.nan).to(dtype)
    return _better(w, ScaledTensor(data, scale, grid), plain, gram)


def _row_parts(n: int, k: int) -> list[slice]:
    rows = max(1, _PART_ELEMENTS // max(k, 1))
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def _scales_of(scale: torch.Tensor, grid: Granularity, rows: slice) -> torch.Tensor:
    """The scales of rows ``[start, stop)``, one row of scales for each if rows of one block are apart."""
    if grid.rows is None:
        return scale
    if grid.rows == 1:
        return scale[rows]
    return scale.repeat_interleave(grid.rows, dim=0)[rows]


def _factor(gram: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of ``gram``, damped until there is one."""
    diagonal = gram.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    for damping in (_DAMPING, 0.1, 1.0):
        damped = gram / mean
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper: torch.Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
    raise UnsupportedError("the second moments of the inputs have no Cholesky decomposition")


def _rounded(w: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The codes, as float32, of ``w [rows, K]``, which is overwritten; ``scale`` has a value for each element."""
    largest = torch.finfo(dtype).max
    codes = torch.empty_like(w)
    for start in range(0, w.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, w.shape[1])
        block, errors = w[:, start:stop].clone(), torch.empty_like(w[:, start:stop])
        own = factor[start:stop, start:stop]
        for column in range(stop - start):
            spread = scale[:, start + column]
            code = nearest_value((block[:, column] / spread).clamp_(-largest, largest), dtype)
            codes[:, start + column] = code
            error = (block[:, column] - code * spread) / own[column, column]
            block[:, column + 1 :].addr_(error, own[column, column + 1 :], alpha=-1)
            errors[:, column] = error
        w[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return codes


def _better(w: torch.Tensor, found: ScaledTensor, plain: ScaledTensor, gram: torch.Tensor) -> Compensated:
    """``found``, with ``plain`` in its place where that is not worse on the calibration inputs."""
    grid = found.granularity
    rows, _ = grid.block(w.shape)
    groups = found.scale.shape[0]
    worse = torch.zeros(2, groups * rows, dtype=torch.float64, device=found.device)
    for place, weight in enumerate((found, plain)):
        for part in _row_parts(*w.shape):
            values = ScaledTensor(weight.data[part], _scales_of(weight.scale, grid, part), _by_row(grid))
            off = dequantize(values).sub_(w[part].to(found.device, torch.float32)).nan_to_num_(0.0, 0.0, 0.0)
            worse[place, part] = (off @ gram).mul_(off).sum(dim=1, dtype=torch.float64)
    ours, theirs = worse.view(2, groups, rows).sum(dim=2)
    keeps = theirs <= ours
    spread = keeps.repeat_interleave(rows)[: w.shape[0], None]
    data = torch.where(spread, plain.data.view(torch.uint8), found.data.view(torch.uint8)).view(found.data.dtype)
    scale = torch.where(keeps[:, None], plain.scale, found.scale)
    return Compensated(ScaledTensor(data, scale, grid), int(keeps.sum()), groups)


def _by_row(grid: Granularity) -> Granularity:
    """The granularity of rows of a weight whose scales ``_scales_of`` has repeated for each."""
    return grid if grid.rows is None else Granularity(1, grid.cols)
