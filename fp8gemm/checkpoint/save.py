"""Saves a model with FP8 layers, bit for bit, as a checkpoint that other libraries can read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..formats import Format, TensorInfo, Written, coarsened, slice_rows, writer
from ..formats.naming import Slice, expert_slices, file_name
from ..scaled import ScaledTensor
from ..weights import FP8Weight
from ..weights.persistence import input_scale_key
from .single import single_file, write_single_file
from .write import Piece, write_checkpoint

# An FP8 weight, and a function that returns one matrix of it.
_Held = tuple[FP8Weight, Callable[[], ScaledTensor]]


def save_checkpoint(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    format: str = "compressed-tensors",
    max_shard_size: int | str = "5GB",
    fp8_heads: bool = False,
) -> list[Path]:
    """Writes ``model`` with the bytes and scales of its FP8 layers unchanged; returns the files.

    Shared tensors are written once, stacked experts under per-expert names, and ``config.json`` is the model's own
    with a ``quantization_config``. Weights that no reader of the format takes in FP8 are written dense: output heads,
    embeddings, and what belongs neither to an nn.Linear nor to a stack of experts.

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
        UnsupportedError: the format cannot express a layer; all reasons, before a byte is written.
        ValueError: the model has tensors on meta.
        CheckpointError: writing failed; nothing incomplete is left.

    Example:
        >>> import tempfile
        >>> from fp8gemm import enable_fp8_gemm
        >>> model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32)))
        >>> [path.name for path in save_checkpoint(model, tempfile.mkdtemp() + "/fp8")]
        ['model.safetensors', 'config.json']
    """
    target = writer(format)
    own = model_config(model)
    kind = str((own or {}).get("model_type", ""))
    weights = {name: p for name, p in model.named_parameters() if isinstance(p, FP8Weight)}
    linears = _linear_weights(model, heads=fp8_heads)
    layers = {name.removesuffix("weight").rstrip("."): p for name, p in weights.items() if name in linears}
    stacks = {name: p for name, p in weights.items() if p.dim() == 3 and p._home.layout.folded is None}
    dense = _dense(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in dense.items()}
    slices = expert_slices({**shapes, **{name: tuple(stack.shape) for name, stack in stacks.items()}}, kind)
    _refuse_stacks(stacks, slices, target)
    held: dict[str, _Held] = {name: (layer, layer._home.scaled) for name, layer in layers.items()}
    for name, part in slices.items():
        if part.name in stacks:
            held[name.removesuffix(".weight")] = (stacks[part.name], partial(_expert, stacks[part.name], part))
    written = {name: _written(owner, weight()) for name, (owner, weight) in held.items()}
    refuse(target, written, "save")
    pieces = [_layer_piece(target, name, *held[name], written[name]) for name in held]
    stacked = {part.name for part in slices.values()}
    pieces += [plain_piece(file_name(name, kind), tensor) for name, tensor in dense.items() if name not in stacked]
    pieces += [
        _dequantized_piece(file_name(name, kind), p)
        for name, p in weights.items()
        if name not in linears and name not in stacks
    ]
    pieces += [plain_piece(name, part.of(dense[part.name])) for name, part in slices.items() if part.name in dense]
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    if target.single_file:
        return [write_single_file(single_file(directory), pieces, what="Saving")]
    config = merged_config(own, target, written, plain)
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


def plain_piece(name: str, tensor: torch.Tensor) -> Piece:
    """A tensor that is written unchanged."""
    info = TensorInfo(dtype=tensor.dtype, shape=tuple(tensor.shape))
    return Piece(tensors={name: info}, make=lambda: {name: tensor})


def _dequantized_piece(name: str, weight: FP8Weight) -> Piece:
    """A weight that is FP8 in the model and dense in the file: its original where that is kept."""
    home = weight._home
    info = TensorInfo(dtype=weight.dtype, shape=tuple(weight.shape))

    def values() -> dict[str, torch.Tensor]:
        exact = home.original is not None and home.dense is None and home.original.dtype == weight.dtype
        return {name: home.original.detach() if exact and home.original is not None else weight.dequantize()}

    return Piece(tensors={name: info}, make=values)


def narrowest_exact(scale: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """``dtype`` if it holds float32 ``scale`` exactly, else float32: llm-compressor's scales have the model's dtype."""
    exact = dtype in (torch.bfloat16, torch.float16) and torch.equal(scale.to(dtype).to(torch.float32), scale)
    return dtype if exact else torch.float32


def _refuse_stacks(stacks: Mapping[str, FP8Weight], slices: Mapping[str, Slice], target: Format) -> None:
    """Raises UnsupportedError for FP8 stacks that have no per-expert names."""
    known = {part.name for part in slices.values()}
    reasons = [
        f"{name}: no per-expert names for "
        f"{'transposed ' if stack._home.layout.turned else ''}experts {list(stack.shape)}"
        for name, stack in stacks.items()
        if stack._home.layout.turned or name not in known
    ]
    if reasons:
        raise UnsupportedError(f"cannot save as {target.name}:\n" + "\n".join(reasons))


def _expert(stack: FP8Weight, part: Slice) -> ScaledTensor:
    whole = stack._home.scaled()
    matrix = ScaledTensor(whole.data[part.expert], whole.scale[part.expert], whole.granularity)
    return coarsened(slice_rows(matrix, part.start, part.stop))


def _written(layer: FP8Weight, weight: ScaledTensor) -> Written:
    if weight.device.type == "meta":
        raise ValueError("the model has FP8 weights on meta; load or materialize them before saving")
    home = layer._home
    input_scale = home.input_scale
    static = home.scheme.static and input_scale is not None
    scales = [weight.scale.flatten(), *([input_scale.flatten()] if static and input_scale is not None else [])]
    return Written(
        scheme=replace(home.scheme, weight=weight.granularity, static=static),
        shape=tuple(weight.shape),
        dtype=weight.data.dtype,
        scale_dtype=narrowest_exact(torch.cat(scales), layer.dtype),
    )


def _layer_piece(
    target: Format, name: str, layer: FP8Weight, weight: Callable[[], ScaledTensor], written: Written
) -> Piece:
    return Piece(
        tensors=target.stored(name, written),
        make=lambda: target.write(name, written, weight(), layer._home.input_scale),
    )


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
