"""``save_pretrained`` of a patched transformers model: a checkpoint that says it is FP8.

Left alone it writes FP8 values without a word about them in ``config.json``, and ``from_pretrained`` takes those for
weights: a model of noise, and a warning about unexpected scales.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from ..weights.holder import FP8Holder
from .save import save_checkpoint

_NAME = "save_pretrained"
# Arguments of transformers' own save_pretrained that change nothing here.
_IDLE = ("token", "save_peft_format", "save_original_format")


def redirect_saving(model: nn.Module) -> None:
    """Lets ``save_pretrained`` of every transformers or diffusers model in ``model`` that is FP8 now go through us."""
    for module in model.modules():
        if _library(module) and any(isinstance(part, FP8Holder) for part in module.modules()):
            # A partial, not a method: copies and pickles of the model then hold one of their own.
            module.__dict__[_NAME] = partial(_save_pretrained, module)


def give_saving_back(model: nn.Module) -> None:
    """The models' own ``save_pretrained`` again."""
    for module in model.modules():
        if getattr(module.__dict__.get(_NAME), "func", None) is _save_pretrained:
            del module.__dict__[_NAME]


def _library(module: nn.Module) -> str:
    """Whose model a module is, if it has that library's way of saving; told without importing either."""
    known = {("PreTrainedModel", "transformers"), ("ModelMixin", "diffusers")}
    found = {(base.__name__, base.__module__.split(".")[0]) for base in type(module).__mro__} & known
    return found.pop()[1] if found else ""


def _save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = True,
    **others: Any,
) -> None:
    """``save_checkpoint(model, save_directory)``, which transformers and vLLM read; and the generation config.

    Raises:
        UnsupportedError: the library cannot read it back, or an argument asks for what is not written here.
    """
    refused = [name for name, value in others.items() if value and name not in _IDLE]
    refused += [] if safe_serialization else ["safe_serialization=False"]
    if refused:
        raise UnsupportedError(
            f"save_pretrained of a model with FP8 layers takes no {', '.join(refused)}; fp8gemm.save_checkpoint(model, "
            "directory) writes the checkpoint, fp8gemm.disable_fp8_gemm(model) gives the dense model back"
        )
    if _library(model) == "diffusers":
        raise UnsupportedError(
            "diffusers reads no FP8 checkpoint; fp8gemm.save_checkpoint(model, directory) writes one for "
            "fp8gemm.load_checkpoint, fp8gemm.disable_fp8_gemm(model) gives the dense model back"
        )
    if not is_main_process:
        return
    save_checkpoint(model, save_directory, max_shard_size=max_shard_size)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(save_directory)
