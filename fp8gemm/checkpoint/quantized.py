"""From a bfloat16 checkpoint to an FP8 one, without a model, one matrix at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch

from ..errors import CheckpointError
from ..formats import Format, Written, writer
from ..quantize import quantize_weight
from ..scaled import FP8GemmOptions, Scheme, SchemeName
from .convert import WriteReport, finish, module_of, plain_piece, refuse_same
from .expert_names import expert_slices, file_name
from .read import Checkpoint, count_nan, open_checkpoint
from .save import refuse
from .write import Piece

# Modules with a matrix for a weight that are no Linear, or a Linear that published FP8 checkpoints leave alone:
# embeddings, output heads and routers.
IGNORE = (
    "*embed*",
    "*wte",
    "*wpe",
    "shared",
    "*relative_attention_bias",
    "*lm_head",
    "*embed_out",
    "*.gate",
    "*router*",
    "*shared_expert_gate",
)

Make = Callable[[], torch.Tensor]


def quantize_checkpoint(
    source: str | os.PathLike[str] | Checkpoint,
    directory: str | os.PathLike[str],
    *,
    scheme: SchemeName | Scheme = "row",
    ignore: Sequence[str] = (),
    format: str = "compressed-tensors",
    max_shard_size: int | str = "5GB",
    device: torch.device | str | None = None,
) -> WriteReport:
    """Makes an FP8 checkpoint of a bfloat16, float16 or float32 one; streams, and needs no model.

    Quantized is every matrix called ``X.weight``, and every expert of stacked ones, unless ignored: embeddings, output
    heads and routers (``IGNORE``) always are.

    Args:
        scheme: of weights and activations.
        ignore: more modules to leave: names, with ``*`` and ``?``, or regexes that begin with ``re:``.
        device: where to compute; by default the CPU.

    Raises:
        UnsupportedError: the format cannot express the scheme.
        CheckpointError: the source is FP8 already or broken, a matrix is not finite, or writing failed.
        ValueError: a static scheme, a pattern that matches nothing, or source and directory are the same.
    """
    resolved = FP8GemmOptions(scheme=scheme).resolved_scheme
    if resolved.static:
        raise ValueError("static activation scales come from calibration; choose a scheme that is not static")
    target = writer(format)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    refuse_same(checkpoint, directory)
    if checkpoint.layers:
        raise CheckpointError(f"{checkpoint.source.path} is FP8 already; convert_checkpoint changes its format")
    matrices, taken = _matrices(checkpoint)
    kept = _ignored(matrices, ignore)
    chosen = {name: matrix for name, matrix in matrices.items() if module_of(name) not in kept}
    if not chosen:
        raise CheckpointError(f"{checkpoint.source.path} has no matrix to quantize: {len(kept)} are ignored")
    written = {module_of(name): Written(scheme=resolved, shape=shape) for name, (shape, _) in chosen.items()}
    refuse(target, written, "quantize")
    kind = _kind(checkpoint)
    pieces = [
        Piece(
            tensors=target.stored(module_of(name), written[module_of(name)]),
            make=partial(_quantized, target, name, written[module_of(name)], make, device),
        )
        for name, (_, make) in chosen.items()
    ]
    for name, key in checkpoint.layout.plain.items():
        if name not in taken and name not in chosen:
            pieces.append(plain_piece(checkpoint, file_name(name, kind), key))
    return finish(
        checkpoint, directory, target, pieces, written, kept=kept, max_shard_size=max_shard_size, what="Quantizing"
    )


def _quantized(
    target: Format, name: str, written: Written, make: Make, device: torch.device | str | None
) -> Mapping[str, torch.Tensor]:
    weight = quantize_weight(
        make(), written.scheme.weight, scale_format=written.scheme.scale_format, device=torch.device(device or "cpu")
    )
    if count := count_nan(weight.data):
        raise CheckpointError(f"{name} holds {count} values that are not finite; nothing was written")
    return target.write(module_of(name), written, weight, None)


def _matrices(checkpoint: Checkpoint) -> tuple[dict[str, tuple[tuple[int, ...], Make]], set[str]]:
    """Name -> shape and how to read it, for all that could be quantized; and the stacked names that were split."""
    found: dict[str, tuple[tuple[int, ...], Make]] = {}
    infos = {name: checkpoint.contents.tensors[key] for name, key in checkpoint.layout.plain.items()}
    wide = {name: info for name, info in infos.items() if info.dtype.is_floating_point and info.dtype.itemsize > 1}
    for name, info in wide.items():
        if name.endswith(".weight") and len(info.shape) == 2 and info.numel:
            found[name] = (info.shape, partial(checkpoint.read, checkpoint.layout.plain[name]))
    slices = expert_slices({name: info.shape for name, info in wide.items()}, _kind(checkpoint))
    for name, part in slices.items():
        shape = (part.stop - part.start, wide[part.name].shape[2])
        key = checkpoint.layout.plain[part.name]
        found[name] = (shape, lambda part=part, key=key: part.of(checkpoint.read(key)))  # type: ignore[misc]
    return found, {part.name for part in slices.values()}


def _ignored(matrices: Mapping[str, object], patterns: Sequence[str]) -> dict[str, str]:
    """Module -> why it is left dense.

    Raises:
        ValueError: one of ``patterns`` matches no module.
    """
    kept: dict[str, str] = {}
    unmatched = set(patterns)
    for name in matrices:
        module = module_of(name)
        for pattern in (*patterns, *IGNORE):
            if _matches(module, pattern):
                kept.setdefault(module, f"ignored by {pattern}")
                unmatched.discard(pattern)
    if unmatched:
        raise ValueError(f"ignore patterns that match no module: {', '.join(sorted(unmatched))}")
    return kept


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return fnmatchcase(module, pattern)


def _kind(checkpoint: Checkpoint) -> str:
    return str((checkpoint.model_config or {}).get("model_type", ""))
