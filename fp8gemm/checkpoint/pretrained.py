"""``save_pretrained`` and ``get_memory_footprint`` of a patched transformers or diffusers model.

Left alone the first writes FP8 values without a word about them in ``config.json``, and ``from_pretrained`` takes those
for weights: a model of noise, and a warning about unexpected scales. The second counts elements in the dtype that
weights are said to be of, and so finds nothing saved.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from ..weights import FP8Weight
from .save import save_checkpoint

# Arguments of transformers' own save_pretrained that change nothing here.
_IDLE = ("token", "save_peft_format", "save_original_format")


def redirect_saving(model: nn.Module) -> None:
    """Lets both methods of every transformers or diffusers model in ``model`` that is FP8 now go through us."""
    for module in model.modules():
        if _library(module) and any(isinstance(part, FP8Weight) for part in module.parameters()):
            for name, method in _METHODS.items():
                # A partial, not a method: copies and pickles of the model then hold one of their own.
                module.__dict__[name] = partial(method, module)


def give_saving_back(model: nn.Module) -> None:
    """The models' own methods again."""
    for module in model.modules():
        for name, method in _METHODS.items():
            if getattr(module.__dict__.get(name), "func", None) is method:
                del module.__dict__[name]


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


def _memory_footprint(model: nn.Module, return_buffers: bool = True) -> int:
    """Bytes that the model holds: of each FP8 weight its bytes, its scales and, where it is kept, its original."""
    tensors = [*model.parameters(), *(model.buffers() if return_buffers else ())]
    return sum(tensor.nbytes for tensor in tensors)


_METHODS: dict[str, Callable[..., Any]] = {
    "save_pretrained": _save_pretrained,
    "get_memory_footprint": _memory_footprint,
}
