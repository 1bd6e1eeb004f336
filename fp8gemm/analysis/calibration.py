"""Calibration inputs from files, for models of transformers."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.transformers_models import tensors_of, tokenized, transformers_model

Batches = list[dict[str, torch.Tensor]]


def model_and_inputs(
    source: str,
    data: str | os.PathLike[str],
    *,
    max_tokens: int = 512,
    device: torch.device | str = "cpu",
    **where: Any,
) -> tuple[nn.Module, Batches]:
    """A model that transformers loads, and inputs for it from a file.

    Args:
        source: a folder, or an id on the Hub.
        data: a text file, of which each line that is not blank becomes a sequence of at most ``max_tokens`` tokens; or
            a safetensors file with one batch, its tensors named as the arguments of the model.
        where: ``revision``, ``cache_dir`` and ``offline``, as for ``open_checkpoint``.

    Raises:
        CheckpointError: the model, its tokenizer or the safetensors file cannot be read.
        ValueError: the text file cannot be read or is empty.
        UnsupportedError: transformers is not installed.
    """
    if Path(data).suffix == ".safetensors":
        inputs = [dict(tensors_of(data))]
        if not inputs[0]:
            raise ValueError(f"{data} has no tensors: name each as the argument of the model that it is for")
    else:
        inputs = _by_length(tokenized(source, _lines(data), max_tokens=max_tokens, **where))
    model = transformers_model(source, device=device, **where)
    return model, [{name: tensor.to(device) for name, tensor in batch.items()} for batch in inputs]


def _lines(data: str | os.PathLike[str]) -> list[str]:
    try:
        text = Path(data).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{data}: neither a text file in UTF-8 nor a .safetensors file: {error}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{data} has no text")
    return lines


def _by_length(sequences: Batches) -> Batches:
    """The sequences of one length as one batch, which needs no padding: it would count as tokens."""
    groups: dict[tuple[int, ...], Batches] = defaultdict(list)
    for sequence in sequences:
        groups[tuple(tensor.shape[-1] for tensor in sequence.values())].append(sequence)
    return [{name: torch.cat([one[name] for one in group]) for name in group[0]} for group in groups.values()]
