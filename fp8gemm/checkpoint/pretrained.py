"""``save_pretrained`` and ``get_memory_footprint`` of a patched transformers or diffusers model.

The libraries' own ``save_pretrained`` would write FP8 values without saying so in ``config.json``, and
``from_pretrained`` would take them for weights: a model of noise, with only a warning about unexpected scales. Their
own ``get_memory_footprint`` multiplies element counts by the size of the reported dtype, and so would show no savings.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from ..weights import FP8Weight
from ..weights.sharding import held
from .conversion import library_of
from .gather import split_tensors
from .save import save_checkpoint
from .switch import copy_into

# Arguments of transformers' own save_pretrained that have no effect here.
_IDLE = ("token", "save_peft_format", "save_original_format")


def redirect_saving(model: nn.Module) -> None:
    """Overrides both methods on every transformers or diffusers model within ``model`` that has FP8 weights."""
    for module in model.modules():
        if library_of(module) and any(isinstance(held(part), FP8Weight) for part in module.parameters()):
            for name, method in _METHODS.items():
                # A partial, not a bound method: copies and pickles of the model then get their own.
                module.__dict__[name] = partial(method, module)


def give_saving_back(model: nn.Module) -> None:
    """Restores the models' own methods."""
    for module in model.modules():
        for name, method in _METHODS.items():
            if getattr(module.__dict__.get(name), "func", None) is method:
                del module.__dict__[name]


def _save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = True,
    **others: Any,
) -> None:
    """``save_checkpoint(model, save_directory)``, which transformers and vLLM read, and the generation config.

    Raises:
        UnsupportedError: the library cannot read the result, or an argument is not supported here.
    """
    refused = [name for name, value in others.items() if value and name not in _IDLE]
    refused += [] if safe_serialization else ["safe_serialization=False"]
    if refused:
        raise UnsupportedError(
            f"save_pretrained of a model with FP8 layers does not support {', '.join(refused)}; "
            "fp8gemm.save_checkpoint(model, directory) writes the checkpoint, fp8gemm.disable_fp8_gemm(model) restores "
            "the dense model"
        )
    if library_of(model) == "diffusers":
        raise UnsupportedError(
            "diffusers reads no folder of FP8 weights without SDNQ, torchao or ModelOpt; "
            "fp8gemm.save_checkpoint(model, directory) writes one for fp8gemm.load_checkpoint, "
            "fp8gemm.disable_fp8_gemm(model) restores the dense model"
        )
    if not is_main_process and not split_tensors(model):
        return
    written = save_checkpoint(model, save_directory, max_shard_size=max_shard_size)
    generation = getattr(model, "generation_config", None)
    if generation is not None and written:
        with tempfile.TemporaryDirectory() as folder:
            generation.save_pretrained(folder)
            copy_into(Path(folder).iterdir(), save_directory)


def _memory_footprint(model: nn.Module, return_buffers: bool = True) -> int:
    """Bytes of the model's tensors; an FP8 weight counts its data, its scales and its original, if that is kept."""
    tensors = [*model.parameters(), *(model.buffers() if return_buffers else ())]
    return sum(tensor.nbytes for tensor in tensors)


_METHODS: dict[str, Callable[..., Any]] = {
    "save_pretrained": _save_pretrained,
    "get_memory_footprint": _memory_footprint,
}
