"""What the shapes of a weight and of its scales say about each other."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import CheckpointError
from ..scaled import ROW, TENSOR, Granularity


def granularity_of(
    shape: tuple[int, ...], grid: tuple[int, ...], hints: Sequence[Granularity] = ()
) -> Granularity | None:
    """The granularity of scales of shape ``grid`` for a weight of ``shape [..., N, K]``; None if none fits.

    Block sizes are not guessed from the two shapes: they come from ``hints``, which a config gives, or from a third
    dimension, ``[N, groups, 1]``.
    """
    lead, (n, k) = shape[:-2], shape[-2:]
    if len(shape) == 2 and len(grid) == 4 and grid[1] == grid[3] == 1:
        grid = (grid[0], grid[2])
    if len(shape) == 2 and len(grid) == 3 and grid[0] == n and grid[2] == 1 and k % max(grid[1], 1) == 0:
        # Rows were viewed as (groups, size), so that the size is certain.
        return ROW if grid[1] == 1 else Granularity(1, k // max(grid[1], 1))
    for hint in hints:
        if hint.scale_shape(shape) == grid:
            return hint
        # Transposed experts [E, K, N] may also store their scales as (E, N, 1).
        if hint == Granularity(None, 1) and lead and grid == (*lead, k, 1):
            return hint
    if all(size == 1 for size in grid) or grid in (lead, (*lead, 1), (*lead, 1, 1)):
        return TENSOR
    if grid in ((*lead, n), (*lead, n, 1)):
        return ROW
    if lead and grid == (*lead, 1, k):  # transposed experts [E, K, N] with one scale per output
        return Granularity(None, 1)
    return None


def even_blocks(shape: tuple[int, ...], grid: tuple[int, ...]) -> Granularity | None:
    """The square blocks of a power of two that divide a matrix evenly into ``grid``; None if there are none.

    No other power of two gives that grid, not even with blocks that are cut at the edges.
    """
    if len(shape) != 2 or len(grid) != 2 or min(grid) < 1 or max(grid) == 1:
        return None
    size = shape[0] // grid[0]
    even = size * grid[0] == shape[0] and size * grid[1] == shape[1]
    return Granularity(size, size) if even and size >= 16 and size & (size - 1) == 0 else None


def block_granularity(block: object) -> Granularity:
    """A config's block size, such as ``[128, 128]``, as a granularity.

    Raises:
        CheckpointError: it is not two positive integers.
    """
    if isinstance(block, Sequence) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block):
        return Granularity(block[0], block[1])
    raise CheckpointError(f"the config's block size must be two positive integers, found {block!r}")
