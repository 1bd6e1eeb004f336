"""Which part of a stored weight a view covers, found from its size, strides and offset."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..scaled import Granularity, ScaledTensor


def swapped(size: Sequence[int], flipped: bool) -> tuple[int, ...]:
    """A shape with its last two dimensions exchanged if ``flipped``."""
    *stack, a, b = size
    return (*stack, b, a) if flipped else (*stack, a, b)


@dataclass(frozen=True)
class Layout:
    """How a weight lies in the (virtual) memory of its dense values.

    ``shape`` is ``[N, K]``, or ``[E, N, K]`` for a stack of experts. ``turned`` means transposed in memory: the last
    two dimensions of the parameter are ``[K, N]``, as in transformers' Conv1D and some stacks. ``folded`` is the
    parameter's own shape where it has another number of dimensions over the same memory: ``[N, C, 1, 1]`` for a
    convolution, or ``[E * N, K]`` for a stack without a dimension for the experts.
    """

    shape: tuple[int, ...]
    turned: bool = False
    folded: tuple[int, ...] | None = None

    @staticmethod
    def of(memory: Sequence[int], *, turned: bool = False, folded: Sequence[int] | None = None) -> Layout:
        """The layout of a parameter whose memory has this shape: ``[(E,) N, K]``, or ``[(E,) K, N]`` if ``turned``."""
        return Layout(swapped(memory, turned), turned, None if folded is None else tuple(folded))

    @property
    def matrix(self) -> tuple[int, int]:
        return self.shape[-2], self.shape[-1]

    @property
    def steps(self) -> tuple[int, int]:
        """The strides along N and along K, in elements."""
        n, k = self.matrix
        return (1, max(n, 1)) if self.turned else (max(k, 1), 1)

    @property
    def size(self) -> tuple[int, ...]:
        """The parameter's own shape."""
        return self.memory if self.folded is None else self.folded

    @property
    def memory(self) -> tuple[int, ...]:
        """The shape of the memory, with one dimension each for experts, rows and columns."""
        return swapped(self.shape, self.turned)

    def like(self, size: Sequence[int]) -> Layout:
        """The same layout for a parameter of another size.

        Raises:
            ValueError: the layout is folded, and ``size`` differs: it does not say which dimensions are N and K.
        """
        if self.folded is None:
            return Layout.of(size, turned=self.turned)
        if tuple(size) != self.folded:
            raise ValueError(f"the FP8 weight has shape {self.folded}, found {tuple(size)}; reshape the values")
        return self

    def plain(self, values: torch.Tensor) -> torch.Tensor:
        """Values in the parameter's own shape, as a view ``[(E,) N, K]``."""
        values = values.view(self.memory) if self.folded is not None else values
        return values.transpose(-1, -2) if self.turned else values

    def shaped(self, plain: torch.Tensor) -> torch.Tensor:
        """``plain [(E,) N, K]`` in the parameter's own shape, contiguous."""
        values = plain.transpose(-1, -2).contiguous() if self.turned else plain
        return values.reshape(self.folded) if self.folded is not None else values

    @property
    def stride(self) -> tuple[int, ...]:
        """The parameter's own strides, those of a contiguous tensor."""
        if self.folded is not None:
            return _contiguous(self.folded)
        n, k = self.matrix
        inner = (max(n, 1), 1) if self.turned else (max(k, 1), 1)
        return (max(n, 1) * max(k, 1), *inner) if len(self.shape) == 3 else inner


def _contiguous(size: Sequence[int]) -> tuple[int, ...]:
    steps, step = [], 1
    for extent in reversed(size):
        steps.append(step)
        step *= max(extent, 1)
    return tuple(reversed(steps))


@dataclass(frozen=True)
class Part:
    """Consecutive rows and columns of one matrix, or consecutive experts of a stack.

    ``rows``, ``cols`` and ``experts`` are (first, count). ``experts`` is None for a matrix ``[N, K]``; ``single`` means
    that one expert was taken out of its stack, without its dimension. ``flipped`` means that the view has K before N.
    """

    rows: tuple[int, int]
    cols: tuple[int, int]
    experts: tuple[int, int] | None = None
    single: bool = False
    flipped: bool = False

    def whole(self, layout: Layout) -> bool:
        """Whether the part is the whole weight, flipped or not."""
        n, k = layout.matrix
        everything = None if len(layout.shape) == 2 else (0, layout.shape[0])
        return self.rows == (0, n) and self.cols == (0, k) and self.experts == everything and not self.single

    def all_columns(self, layout: Layout) -> bool:
        return self.cols == (0, layout.shape[-1])

    def take(self, weight: ScaledTensor, *, to_write: bool = False) -> ScaledTensor | None:
        """The part's bytes and scales, as views; None where its start is inside a scale block.

        The part may end inside a block, except with ``to_write``: others share the scale of that block.
        """
        (r, rows), (c, cols) = self.rows, self.cols
        n, k = weight.shape[-2:]
        grid = weight.granularity
        if _cuts(grid.rows, r, rows, n, to_write) or _cuts(grid.cols, c, cols, k, to_write):
            return None
        by_row, by_col = _blocks(grid.rows, r, rows), _blocks(grid.cols, c, cols)
        return ScaledTensor(self.cut(weight.data), self._of_experts(weight.scale)[..., by_row, by_col], grid)

    def take_finer(self, weight: ScaledTensor) -> ScaledTensor | None:
        """Like ``take``, but a part that starts inside a block gets smaller blocks with repeated scales."""
        rows, first = weight.granularity.rows, self.rows[0]
        if rows is None or first % rows == 0:
            return self.take(weight)
        finer = math.gcd(first, rows)
        scale = weight.scale.repeat_interleave(rows // finer, dim=-2)[..., : -(-weight.shape[-2] // finer), :]
        return self.take(ScaledTensor(weight.data, scale, Granularity(finer, weight.granularity.cols)))

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        """The part's values, as a view of those of the whole weight ``[(E,) N, K]``."""
        (r, rows), (c, cols) = self.rows, self.cols
        return self._of_experts(values)[..., r : r + rows, c : c + cols]

    def _of_experts(self, values: torch.Tensor) -> torch.Tensor:
        if self.experts is None:
            return values
        first, count = self.experts
        return values[first] if self.single else values[first : first + count]


def _cuts(block: int | None, first: int, count: int, total: int, to_write: bool) -> bool:
    """Whether a range starts inside a block or, with ``to_write``, ends inside one."""
    if block is None:
        return to_write and count != total
    end = first + count
    return first % block != 0 or (to_write and end % block != 0 and end != total)


def _blocks(block: int | None, first: int, count: int) -> slice:
    return slice(None) if block is None else slice(first // block, -(-(first + count) // block))


def part_of(layout: Layout, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Part | None:
    """The part that a view of this size, stride and offset covers; None if it is not such a rectangle."""
    try:
        return _remembered_part(layout, size, stride, offset)
    except TypeError:  # a symbolic size, as of the experts chosen for a number of tokens that a trace leaves open
        return _part_of(layout, size, stride, offset)


def _part_of(layout: Layout, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Part | None:
    n, k = layout.matrix
    stack = len(layout.shape) == 3
    if layout.folded is not None and tuple(size) == layout.folded and tuple(stride) == layout.stride:
        everything = (0, layout.shape[0]) if stack else None
        return None if 0 in size else Part((0, n), (0, k), everything, flipped=layout.turned)
    if len(size) not in (2, 3) or n == 0 or k == 0 or (len(size) == 3 and not stack) or 0 in size:
        return None
    expert, rest = divmod(offset, n * k)
    experts: tuple[int, int] | None = (expert, 1) if stack else None
    if len(size) == 3:
        if stride[0] != n * k and size[0] != 1:
            return None
        experts = (expert, size[0])
    if (stack and experts is not None and sum(experts) > layout.shape[0]) or (not stack and expert):
        return None
    col, row = divmod(rest, n) if layout.turned else reversed(divmod(rest, k))
    (a, b), (step_a, step_b) = size[-2:], stride[-2:]
    along_n, along_k = layout.steps
    for flipped, rows, cols, step_rows, step_cols in ((False, a, b, step_a, step_b), (True, b, a, step_b, step_a)):
        lies = (step_rows == along_n or rows == 1) and (step_cols == along_k or cols == 1)
        if lies and row + rows <= n and col + cols <= k:
            return Part((row, rows), (col, cols), experts, single=stack and len(size) == 2, flipped=flipped)
    return None


_remembered_part = lru_cache(maxsize=4096)(_part_of)
