"""Weights that are FP8 in a model but dense on disk, such as heads and convolutions: quantized again when it is loaded.

A file's metadata says how, for each of them, under ``fp8gemm.quantize.NAME``; other readers ignore it. The largest
value of each block is exact in the dense weight (which is rounded to the model's dtype), so quantizing it again gives
the same scales and bytes, except that a float32 scale may differ in its last bit. Scales that were searched for, or
are not those of the largest values for another reason, are in the metadata.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ..engines import choose, probe
from ..errors import CheckpointError, UnsupportedError
from ..numerics import block_amax
from ..scaled import FP8_DTYPES, FP8GemmOptions, Granularity, ScaledTensor, Scheme
from ..weights import FP8Linear, FP8Weight
from ..weights.convert import Change, made
from ..weights.geometry import Layout
from ..weights.packed import spec_of
from ..weights.quantization import quantize_weight
from ..weights.sharding import held
from .targets import Target, groups, targets

_PREFIX = "fp8gemm.quantize."


def described(weights: Mapping[str, FP8Weight]) -> dict[str, str]:
    """The metadata for these weights of a model, by name."""
    return {_PREFIX + name: json.dumps(_description(weight)) for name, weight in weights.items()}


def _description(weight: FP8Weight) -> dict[str, Any]:
    home, scheme = weight._home, weight.scheme
    input_scale = home.input_scale if scheme.static else None
    return {
        "scheme": asdict(scheme),
        "dtype": str(home.options.weight_dtype).removeprefix("torch."),
        "layout": asdict(home.layout),
        "input_scale": None if input_scale is None else input_scale.tolist(),
        **({} if home.search is None and _of_largest(home.scaled()) else {"scale": _text(home.scaled().scale)}),
    }


def _of_largest(weight: ScaledTensor) -> bool:
    """Whether a block's largest code is the largest of the format, so that its scale is found again; of zeros, any."""
    codes = weight.data.view(torch.uint8) & 0x7F
    largest = torch.tensor(torch.finfo(weight.data.dtype).max, dtype=torch.float32, device="cpu")
    top = int(largest.to(weight.data.dtype).view(torch.uint8))
    found = block_amax(torch.where(codes > top, 0, codes), weight.granularity)
    rounded_up = weight.scale.frexp().mantissa == 0.5  # to a power of two, which is found again whatever the codes
    return bool(((found == top) | (found == 0) | rounded_up).all())


def _text(scale: torch.Tensor) -> str:
    return base64.b64encode(bytes(scale.cpu().contiguous().view(torch.uint8).flatten().tolist())).decode()


def _scale(text: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The scales that ``_text`` wrote.

    Raises:
        ValueError: it is something else.
    """
    scale = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float32)
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError("scales must be finite and positive")
    return scale.reshape(shape)


def requantize(model: nn.Module, metadata: Mapping[str, str], options: FP8GemmOptions) -> None:
    """Converts the dense weights of ``model`` that were FP8 when it was saved, ties included.

    A weight that no engine can multiply here stays dense.

    Raises:
        CheckpointError: what the metadata says of a weight cannot be read, or is of another shape.
    """
    described = {key.removeprefix(_PREFIX): text for key, text in metadata.items() if key.startswith(_PREFIX)}
    if not described:
        return
    for same in groups(targets(model).values()):
        name = next((target.name for target in same if target.name in described), None)
        if name is not None and not isinstance(held(same[0].tensor), FP8Weight) and same[0].is_parameter:
            _convert(same, name, described[name], options)


def _convert(same: Sequence[Target], name: str, text: str, options: FP8GemmOptions) -> None:
    try:
        scheme, dtype, layout, input_scale, scale = _read(text)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"the metadata does not say how to quantize {name}: {text[:200]!r}") from error
    first = same[0]
    if layout.size != tuple(first.tensor.shape):
        raise CheckpointError(
            f"{name} was saved from an FP8 weight of shape {list(layout.size)}, found {list(first.tensor.shape)}"
        )
    if options.resolved_scheme.activation is None:
        scheme, input_scale = scheme.weight_only(), None
    own = replace(options, scheme=scheme, weight_dtype=dtype, fp16_weight_storage="discard", weight_search="none")
    device = first.tensor.device
    try:
        choose(spec_of(layout.shape, own, scheme, first.tensor.dtype), probe(device), own.engine)
    except UnsupportedError:
        return
    static = None if input_scale is None else torch.tensor(input_scale, dtype=torch.float32, device=device)
    weight = None if scale is None else _quantized(first.tensor.detach(), layout, scale.to(device), own)
    new = made(first.module, first.attribute, own, layout=layout, weight=weight, input_scale=static)
    change = Change(*((target.module, target.attribute, _kind(target)) for target in same))
    try:
        change.put(new)
    except BaseException:
        change.undo()
        raise


def _quantized(dense: torch.Tensor, layout: Layout, scale: torch.Tensor, options: FP8GemmOptions) -> ScaledTensor:
    """A dense weight quantized with these scales."""
    grid, dtype = options.resolved_scheme.weight, options.weight_dtype
    w = layout.plain(dense if layout.folded is None else dense.contiguous())
    if w.dim() == 2:
        return quantize_weight(w, grid, dtype=dtype, scale=scale)
    data = torch.empty(w.shape, dtype=dtype, device=w.device)
    for expert, (matrix, own) in enumerate(zip(w, scale, strict=True)):
        data[expert] = quantize_weight(matrix, grid, dtype=dtype, scale=own).data
    return ScaledTensor(data, scale, grid)


def _kind(target: Target) -> type[nn.Module] | None:
    return FP8Linear if type(target.module) is nn.Linear and target.attribute == "weight" else None


def _read(text: str) -> tuple[Scheme, torch.dtype, Layout, list[float] | None, torch.Tensor | None]:
    given = json.loads(text)
    scheme = dict(given["scheme"])
    weight, activation = scheme.pop("weight"), scheme.pop("activation")
    grid = None if activation is None else Granularity(**activation)
    dtype = getattr(torch, given["dtype"])
    if dtype not in FP8_DTYPES:
        raise ValueError(f"{dtype} is not FP8")
    place = given["layout"]
    folded = None if place["folded"] is None else tuple(place["folded"])
    layout = Layout(tuple(place["shape"]), bool(place["turned"]), folded)
    found = Scheme(weight=Granularity(**weight), activation=grid, **scheme)
    scale = None if "scale" not in given else _scale(given["scale"], found.weight.scale_shape(layout.shape))
    return found, dtype, layout, given["input_scale"], scale
