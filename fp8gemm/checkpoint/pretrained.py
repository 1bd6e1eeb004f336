"""How patched models of other libraries save themselves and count their memory.

Their own ``save_pretrained`` would write FP8 values without saying so in ``config.json``, and ``from_pretrained`` would
take them for weights: a model of noise, with only a warning about unexpected scales. A model of transformers, which
reads FP8, is saved as ``save_checkpoint`` does; models of diffusers and modules of sentence-transformers are saved by
their own methods, with dense values. Their own ``get_memory_footprint`` multiplies element counts by the size of the
reported dtype, and so would show no savings.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..weights import FP8Weight
from ..weights.persistence import input_scale_key
from ..weights.sharding import held
from .conversion import library_of
from .gather import split_tensors
from .parts import values
from .save import save_checkpoint
from .switch import copy_into

# Arguments of transformers' own save_pretrained that have no effect here.
_IDLE = ("token", "save_peft_format", "save_original_format")


def redirect_saving(model: nn.Module) -> None:
    """Overrides the methods of ``_METHODS`` on every model of those libraries within ``model`` that has FP8 weights."""
    for module in model.modules():
        methods = _METHODS.get(library_of(module))
        if methods and any(isinstance(held(part), FP8Weight) for part in module.parameters()):
            for name, method in methods.items():
                # A partial, not a bound method: copies and pickles of the model then get their own.
                module.__dict__[name] = partial(method, module)


def give_saving_back(model: nn.Module) -> None:
    """Restores the models' own methods."""
    for module in model.modules():
        for name, method in _METHODS.get(library_of(module), {}).items():
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
    if not is_main_process and not split_tensors(model):
        return
    written = save_checkpoint(model, save_directory, max_shard_size=max_shard_size)
    generation = getattr(model, "generation_config", None)
    if generation is not None and written:
        with tempfile.TemporaryDirectory() as folder:
            generation.save_pretrained(folder)
            copy_into(Path(folder).iterdir(), save_directory)


def _save_diffusers(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    use_flashpack: bool = False,
    **others: Any,
) -> None:
    """The model's own ``save_pretrained``, whose arguments a pipeline looks up in this signature, with dense values."""
    if split_tensors(model):
        raise UnsupportedError(
            "diffusers saves no weights that are split among ranks; fp8gemm.save_checkpoint(model, directory) writes "
            "them for fp8gemm.load_checkpoint"
        )
    if use_flashpack:
        others["use_flashpack"] = True
    with _dense_state_dict(model):
        type(model).save_pretrained(  # type: ignore[attr-defined]
            model,
            save_directory,
            is_main_process=is_main_process,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            **others,
        )


def _save_sentence_transformers(module: nn.Module, output_path: str, safe_serialization: bool = True) -> None:
    """The module's own ``save_torch_weights``, with dense values."""
    with _dense_state_dict(module):
        type(module).save_torch_weights(module, output_path, safe_serialization=safe_serialization)  # type: ignore[attr-defined]


@contextlib.contextmanager
def _dense_state_dict(model: nn.Module) -> Iterator[None]:
    """Within it, ``model.state_dict()`` has dense values, exact where originals are kept, and no scales."""

    def dense(*args: Any, **kwargs: Any) -> Mapping[str, Any]:
        weights = {name: p for name, p in model.named_parameters(remove_duplicate=False) if isinstance(p, FP8Weight)}
        scales = {f"{name}_scale" for name in weights}
        scales |= {input_scale_key(name) for name, p in weights.items() if p._home.input_scale is not None}
        once: dict[int, torch.Tensor] = {}  # tied weights stay tied
        state: dict[str, Any] = type(model).state_dict(model, *args, **kwargs)
        for key in [key for key in state if key in scales]:
            del state[key]
        for key in state.keys() & weights.keys():
            home = weights[key]._home
            if id(home) not in once:
                once[id(home)] = values(weights[key]).cpu()
            state[key] = once[id(home)]
        return state

    model.__dict__["state_dict"] = dense
    try:
        yield
    finally:
        del model.__dict__["state_dict"]


def _memory_footprint(model: nn.Module, return_buffers: bool = True) -> int:
    """Bytes of the model's tensors; an FP8 weight counts its data, its scales and its original, if that is kept."""
    tensors = [*model.parameters(), *(model.buffers() if return_buffers else ())]
    return sum(tensor.nbytes for tensor in tensors)


_METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "transformers": {"save_pretrained": _save_pretrained, "get_memory_footprint": _memory_footprint},
    "diffusers": {"save_pretrained": _save_diffusers, "get_memory_footprint": _memory_footprint},
    "sentence_transformers": {"save_torch_weights": _save_sentence_transformers},
}
