"""Models and tokenizers that transformers loads: by folder, or by an id on the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import CheckpointError, UnsupportedError


def transformers_model(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The model of a folder or a repository, in the class and dtype that its config names, in evaluation mode.

    Raises:
        UnsupportedError: transformers is not installed, or has no class for the model.
        CheckpointError: it cannot be loaded; the message says why.
    """
    transformers, where = _transformers(), _where(revision, cache_dir, offline)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **where)
        names = [name for name in getattr(config, "architectures", None) or () if hasattr(transformers, name)]
        kind = getattr(transformers, names[0]) if names else transformers.AutoModel
        model: nn.Module = kind.from_pretrained(source, config=config, dtype="auto", **where)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{source}: transformers cannot load a model from it: {error}") from error
    return model.to(device).eval()


def tokenized(
    source: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    max_tokens: int,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """The inputs of a model for each text, as its tokenizer makes them, with at most ``max_tokens`` tokens each.

    Raises:
        UnsupportedError: transformers is not installed.
        CheckpointError: there is no tokenizer.
    """
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **_where(revision, cache_dir, offline))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: transformers finds no tokenizer there: {error}") from error
    most = min(max_tokens, tokenizer.model_max_length)
    return [dict(tokenizer(text, truncation=True, max_length=most, return_tensors="pt")) for text in texts]


def tensors_of(file: str | os.PathLike[str]) -> Mapping[str, torch.Tensor]:
    """All tensors of a safetensors file, by their names.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return load_file(Path(file))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a safetensors file: {error}") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedError(f"models are loaded by transformers, which cannot be imported: {error}") from error
    return transformers


def _where(revision: str | None, cache_dir: str | os.PathLike[str] | None, offline: bool) -> dict[str, Any]:
    given = {"revision": revision, "cache_dir": cache_dir, "local_files_only": offline or None}
    return {name: value for name, value in given.items() if value is not None}
