"""What FP8 would save in a checkpoint: bytes alone, from the headers of its files."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..checkpoint import Checkpoint
from ..checkpoint.matrices import module_of, select
from ..scaled import FP8GemmOptions, Scheme, SchemeName
from .gain import Estimate, LayerEstimate


def estimate_checkpoint(
    checkpoint: Checkpoint,
    *,
    scheme: SchemeName | Scheme = "row",
    ignore: Sequence[str] = (),
    fp8_heads: bool = False,
) -> Estimate:
    """The bytes that ``quantize_checkpoint`` with the same arguments would write; no weight is read.

    Raises:
        CheckpointError: the checkpoint is FP8 already or quantized otherwise, or nothing is left to quantize.
        ValueError: a pattern of ``ignore`` matches no module.
    """
    resolved = FP8GemmOptions(scheme=scheme).resolved_scheme
    selection = select(checkpoint, ignore, fp8_heads=fp8_heads)
    rows = []
    for name, matrix in selection.matrices.items():
        reason = selection.kept.get(module_of(name), "")
        after = math.prod(matrix.shape) + 4 * math.prod(resolved.weight.scale_shape(matrix.shape))
        row = LayerEstimate(
            name=module_of(name),
            status="kept" if reason else "fp8",
            shape=tuple(matrix.shape),
            reason=reason,
            scheme="" if reason else str(resolved),
            bytes_before=matrix.nbytes,
            bytes_after=matrix.nbytes if reason else after,
        )
        rows.append(row)
    saved = sum(row.bytes_before - row.bytes_after for row in rows)
    return Estimate(
        rows=tuple(rows),
        untimed="a checkpoint does not run; fp8gemm.estimate(model, *inputs) times a model",
        model_bytes_before=checkpoint.nbytes,
        model_bytes_after=checkpoint.nbytes - saved,
    )
