"""Saves a model with FP8 layers, bit for bit, as a checkpoint that other libraries can read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..formats import Format, TensorInfo, Written, writer
from ..weights import FP8Weight
from ..weights.persistence import input_scale_key
from .gather import on_one_rank
from .parts import Part, parts
from .requantize import described
from .single import single_file, write_single_file
from .write import Piece, write_checkpoint


def save_checkpoint(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    format: str = "compressed-tensors",
    max_shard_size: int | str = "5GB",
    fp8_heads: bool = False,
) -> list[Path]:
    """Writes ``model`` with the bytes and scales of its FP8 layers unchanged; returns the files.

    If its parameters are split among ranks (DTensors), all ranks have to call this: the first gathers them in CPU
    memory and writes; the others return no files.

    Names are those of the model's own checkpoints: from transformers' conversion mapping for its models, else from the
    file that the model was loaded from; stacks of experts of other models get per-expert names. Shared tensors are
    written once, and ``config.json`` is the model's own with a ``quantization_config``. Weights that no reader of the
    format takes in FP8 are written dense: output heads, embeddings, experts that are published as one stack, and what
    belongs to no nn.Linear; ``load_checkpoint`` quantizes them again.

    Args:
        directory: a folder; for ``"comfy"`` a path that ends with ``.safetensors``, or a folder for
            ``model.safetensors``.
        format: ``"compressed-tensors"`` (scales per tensor, row, block or group), ``"fine-grained"`` (scales per
            block or tensor) or ``"comfy"``: one file for ComfyUI, without a config (scales per tensor, or per row,
            square block or 32 elements, MXFP8; ComfyUI reads those per row and block with ComfyUI-QuantOps).
        max_shard_size: bytes, or a string such as ``"5GB"``; does not apply to ``"comfy"``.
        fp8_heads: write the output head in FP8 too, unless it is tied to the embeddings. ``load_checkpoint`` and
            transformers read that, serving engines do not.

    Raises:
        UnsupportedError: the format cannot express a layer, with all reasons, or transformers' mapping would load a
            tensor as another one; before a byte is written.
        ValueError: the model has tensors on meta.
        CheckpointError: writing failed; nothing incomplete is left.

    Example:
        >>> import tempfile
        >>> from fp8gemm import enable_fp8_gemm
        >>> model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32)))
        >>> [path.name for path in save_checkpoint(model, tempfile.mkdtemp() + "/fp8")]
        ['model.safetensors', 'config.json']
    """
    return on_one_rank(
        model, lambda: _save(model, directory, writer(format), max_shard_size=max_shard_size, fp8_heads=fp8_heads)
    )


def _save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    target: Format,
    *,
    max_shard_size: int | str,
    fp8_heads: bool,
) -> list[Path]:
    own = model_config(model)
    kind = str((own or {}).get("model_type", ""))
    weights = {name: p for name, p in model.named_parameters() if isinstance(p, FP8Weight)}
    _refuse_meta(weights)
    linears = _linear_weights(model, heads=fp8_heads) & weights.keys()
    groups = parts(model, {**weights, **_dense(model)}, linears, kind, target.name)
    written = {part.module: part.written() for group in groups for part in group if part.weight is not None}
    refuse(target, written, "save")
    pieces = [_piece(target, group, written, weights) for group in groups]
    if target.single_file:
        return [write_single_file(single_file(directory), pieces, what="Saving")]
    config = merged_config(own, target, *_described(model, groups, written))
    return write_checkpoint(directory, pieces, config=config, max_shard_size=max_shard_size, what="Saving")


def _linear_weights(model: nn.Module, *, heads: bool) -> set[str]:
    """The names of weights of nn.Linears only, but for output heads and what is tied to embeddings."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append((f"{prefix}.{name}" if prefix else name, module))
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) and not heads else None
    return {
        name
        for places in owners.values()
        for name, module in places
        if name.rpartition(".")[2] == "weight" and all(isinstance(other, nn.Linear) for _, other in places)
        if all(other is not head for _, other in places)
    }


def refuse(target: Format, written: Mapping[str, Written], what: str) -> None:
    """Raises UnsupportedError with all reasons why ``target`` cannot express these layers."""
    reasons = target.refuses(written) if written else []
    if reasons:
        more = f"\nand {len(reasons) - 20} more" if len(reasons) > 20 else ""
        raise UnsupportedError(f"cannot {what} as {target.name}:\n" + "\n".join(reasons[:20]) + more)


def merged_config(
    own: Mapping[str, Any] | None, target: Format, written: Mapping[str, Written], plain: list[str]
) -> dict[str, Any] | None:
    """A model's config with the description of its FP8 layers; None if there is neither."""
    config = {
        key: value for key, value in (own or {}).items() if key not in ("quantization_config", "compression_config")
    }
    if written:
        config["quantization_config"] = target.write_config(written, plain)
    return config if written or own is not None else None


def model_config(model: nn.Module) -> dict[str, Any] | None:
    """The model's own config as it would be in config.json; models of transformers and diffusers have one."""
    config = getattr(model, "config", None)
    for owner in (config, model):
        if callable(as_text := getattr(owner, "to_json_string", None)):
            found: dict[str, Any] = json.loads(as_text())
            if owner is config and not found.get("architectures"):
                found["architectures"] = [type(model).__name__]
            return found
    return dict(config) if isinstance(config, Mapping) else None


def _piece(
    target: Format, group: list[Part], written: Mapping[str, Written], weights: Mapping[str, FP8Weight]
) -> Piece:
    """Parts that are made together, as the format stores them."""

    def stored(part: Part) -> Mapping[str, TensorInfo]:
        if part.weight is None:
            return {part.name: TensorInfo(dtype=part.dtype, shape=part.shape)}
        return target.stored(part.module, written[part.module])

    def made(part: Part) -> Mapping[str, torch.Tensor]:
        if part.weight is not None:
            return target.write(part.module, written[part.module], part.weight(), part.input_scale)
        assert part.dense is not None
        return {part.name: part.dense()}

    dense = {name for part in group if part.weight is None for name in part.sources}
    return Piece(
        tensors={key: info for part in group for key, info in stored(part).items()},
        make=lambda: {key: tensor for part in group for key, tensor in made(part).items()},
        metadata=described({name: weights[name] for name in dense if name in weights}),
    )


def _described(
    model: nn.Module, groups: list[list[Part]], written: Mapping[str, Written]
) -> tuple[dict[str, Written], list[str]]:
    """What a config describes: the FP8 layers, and the dense matrices, under the names that they have in the file and
    in the model: some readers compare with the one, some with the other. A router is a matrix of a module of its own in
    transformers and a linear layer in serving engines, which would take it for FP8 if it were not named."""
    every = [part for group in groups for part in group]
    fp8 = {_module_of(source): part for part in every if part.weight for source in part.sources}
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    dense = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in fp8}
    keys = {f"{name}.weight" if name else "weight" for name in dense}
    for part in (part for part in every if not part.weight):
        is_matrix = part.name.endswith("weight") and len(part.shape) == 2 and not tables & set(part.sources)
        if is_matrix or keys & set(part.sources):
            dense |= {part.module, *(_module_of(source) for source in part.sources if source.endswith(".weight"))}
    layers = {name: written[part.module] for name, part in fp8.items() if part.owners[0].dim() == 2}
    return {**written, **layers}, sorted(dense - written.keys() - layers.keys())


def _module_of(name: str) -> str:
    return name.removesuffix("weight").rstrip(".")


def _refuse_meta(weights: Mapping[str, FP8Weight]) -> None:
    if any(weight.device.type == "meta" for weight in weights.values()):
        raise ValueError("the model has FP8 weights on meta; load or materialize them before saving")


def _dense(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors other than FP8 weights: each once, under its first name."""
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    weights = [n for n, p in model.named_parameters(remove_duplicate=False) if isinstance(p, FP8Weight)]
    ours = {key for name in weights for key in (name, f"{name}_scale", input_scale_key(name))}
    for name, tensor in model.state_dict().items():
        if name in ours or not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            raise ValueError(f"{name} is on meta; load the model before saving it")
        identity = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        found[name] = tensor
    return found
