"""The matrices of a checkpoint that is not FP8 yet, and which of them ``quantize_checkpoint`` quantizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import CheckpointError
from ..formats.naming import expert_slices
from .guards import refuse_quantized
from .ignore import ignored
from .read import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix ``X.weight``, or one expert of a stack: its shape and dtype in the file, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Selection:
    """All matrices by name, why modules stay dense, and the names of the stacks whose experts are among them."""

    matrices: Mapping[str, Matrix]
    kept: Mapping[str, str]
    stacks: frozenset[str]

    @property
    def chosen(self) -> dict[str, Matrix]:
        """The matrices to quantize."""
        return {name: matrix for name, matrix in self.matrices.items() if module_of(name) not in self.kept}


def select(checkpoint: Checkpoint, ignore: Sequence[str] = (), *, fp8_heads: bool = False) -> Selection:
    """What ``quantize_checkpoint`` would do with each matrix.

    Raises:
        CheckpointError: the checkpoint is FP8 already or quantized otherwise, or nothing is left to quantize.
        ValueError: a pattern of ``ignore`` matches no module.
    """
    if checkpoint.layers:
        raise CheckpointError(f"{checkpoint.source.path} is already FP8; convert_checkpoint changes its format")
    refuse_quantized(checkpoint)
    matrices, stacks = _matrices(checkpoint)
    tied = bool((checkpoint.model_config or {}).get("tie_word_embeddings"))
    kept = ignored(matrices, ignore, fp8_heads=fp8_heads and not tied)
    found = Selection(matrices=matrices, kept=kept, stacks=frozenset(stacks))
    if not found.chosen:
        raise CheckpointError(f"{checkpoint.source.path} has no matrices to quantize: {len(kept)} are ignored")
    return found


def module_of(name: str) -> str:
    """The module whose weight is called ``name``."""
    return name.removesuffix(".weight")


def model_type(checkpoint: Checkpoint) -> str:
    """What the config calls the kind of model; empty if it does not."""
    return str((checkpoint.model_config or {}).get("model_type", ""))


def _matrices(checkpoint: Checkpoint) -> tuple[dict[str, Matrix], set[str]]:
    """Every matrix that could be quantized, by name; and the names of split stacks."""
    found: dict[str, Matrix] = {}
    infos = {name: checkpoint.contents.tensors[key] for name, key in checkpoint.layout.plain.items()}
    wide = {name: info for name, info in infos.items() if info.dtype.is_floating_point and info.dtype.itemsize > 1}
    for name, info in wide.items():
        if name.endswith(".weight") and len(info.shape) == 2 and info.numel:
            read = partial(checkpoint.read, checkpoint.layout.plain[name])
            found[name] = Matrix(shape=info.shape, dtype=info.dtype, read=read)
    slices = expert_slices({name: info.shape for name, info in wide.items()}, model_type(checkpoint))
    for name, part in slices.items():
        info, key = wide[part.name], checkpoint.layout.plain[part.name]
        read = partial(lambda part, key: part.of(checkpoint.read(key)), part, key)
        found[name] = Matrix(shape=part.shape(info.shape), dtype=info.dtype, read=read)
    return found, {part.name for part in slices.values()}
