"""What is refused before a byte is written or a tensor changes: weights of which a file holds more than is read."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import CheckpointError
from ..formats import is_codes
from .read import Checkpoint


def refuse_partly_read(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if weights are not FP8, are stored rotated, or have companions of unknown meaning."""
    problems = [f"{name}: {reason}" for name, reason in checkpoint.layout.unsupported.items()]
    problems += companion_problems(checkpoint, checkpoint.layers, known=())
    if problems:
        raise CheckpointError(f"{checkpoint.source.path} cannot be read without loss:\n" + "\n".join(problems))


def companion_problems(checkpoint: Checkpoint, names: Collection[str], known: Collection[str]) -> list[str]:
    """The tensors beside the FP8 weights ``names`` that may change them, but for those called ``known``."""
    problems = []
    for name, beside in checkpoint.layout.companions.items():
        left = [key for key in beside if checkpoint.format.canonical(key) not in known]
        if left and name in names:
            problems.append(
                f"{name}: what {' and '.join(left)} beside it mean is not known, so its values are not; "
                "only a model that has parameters of these names can load it"
            )
    return problems


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless all weights of a checkpoint are in a floating-point type of 16 bits or more."""
    reasons = [f"{name}: {reason}" for name, reason in checkpoint.layout.unsupported.items()]
    tensors = checkpoint.contents.tensors
    scaled = {key.rpartition(".")[0] for key in tensors if "scale" in key.rpartition(".")[2].lower()}
    for key in checkpoint.layout.plain.values():
        # A model's own table of small integers stands beside no scale.
        if is_codes(tensors[key]) and key.rpartition(".")[0] in scaled:
            reasons.append(
                f"{key} is {tensors[key].dtype} {list(tensors[key].shape)} beside a scale: codes of a weight"
            )
    if checkpoint.config:
        said = checkpoint.config.get("quant_method") or checkpoint.config.get("quant_algo") or "without a quant_method"
        reasons.append(
            f"its config has a quantization_config ({said}), which would be lost; if its weights are dense all the "
            "same, remove that section"
        )
    if reasons:
        raise CheckpointError(
            f"{checkpoint.source.path} is quantized already; quantize its dense original, or dequantize it with the "
            "library that made it:\n" + "\n".join(reasons)
        )
