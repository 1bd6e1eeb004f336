"""Classifies the keys of a checkpoint: the tensors decide, the config confirms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import CheckpointError
from ..scaled import MX, ROW, TENSOR, Granularity, Scheme
from .arrangements import spread
from .base import SCALE_DTYPES, UE8M0_DTYPES, Contents, Format, Layer, Layout, Names, TensorInfo
from .companions import Neighbors
from .experts import fused_layer, fused_scale_owner, halves
from .partitions import partitions
from .raw import RawCasts
from .rest import is_part, sort_the_rest
from .shapes import even_blocks, granularity_of


def scan(contents: Contents, format: Format) -> Layout:
    """Finds out what each key is.

    Raises:
        CheckpointError: FP8 without a scale, a scale of the wrong shape or dtype, or two scales for one weight.
    """
    layout = Layout()
    used: set[str] = set()
    raw = RawCasts(contents, format)
    neighbors = Neighbors(contents, format)
    for key, info in contents.tensors.items():
        if format.is_marker(key):
            continue
        names, module = format.names_of(key)
        if names.weight and (reason := format.unreadable(contents, module)):
            layout.unsupported[format.canonical(key)] = reason
            continue
        if format.fp8_dtype(key, info, contents) is None or is_part(contents, format, key):
            continue
        if reason := neighbors.reason(key, names, module):
            layout.unsupported[format.canonical(key)] = reason
            continue
        layer = _layer(contents, format, key, raw)
        if layer is None:
            continue
        layout.layers[layer.name] = layer
        used.update(part for part in (key, layer.scale, layer.input_scale, *layer.zero_points) if part)
        if layer.scale is not None and (beside := neighbors.unknown(key, names, module)):
            layout.companions[layer.name] = beside
    sort_the_rest(contents, format, layout, used)
    format.check(contents, layout)
    return layout


def _layer(contents: Contents, format: Format, key: str, raw: RawCasts) -> Layer | None:
    """The FP8 layer whose weight is ``key``; None for a raw cast that is not a module's matrix."""
    info = contents.tensors[key]
    dtype = format.fp8_dtype(key, info, contents)
    assert dtype is not None
    names, module = format.names_of(key)
    name = format.canonical(key)
    # Only matrices and stacks of them have scales: a vector and its neighbors are a model's own parameters.
    suffixes = names.scales if len(info.shape) >= 2 else ()
    found = [module + suffix for suffix in suffixes if module + suffix in contents.tensors]
    if len(found) > 1:
        raise CheckpointError(f"{key} has {len(found)} scales, {' and '.join(found)}; only one is allowed")
    if not found:
        if (fused := fused_scale_owner(contents, key)) is not None:
            hints = _hints(contents, format, module, contents.tensors[fused])
            layer = fused_layer(contents, name, key, dtype, fused, hints, granularity_of)
            return _with_scheme(contents, format, module, layer, names)
        raw.check(key)
        if len(info.shape) != 2 or not names.weight:
            return None
        scheme = Scheme(weight=TENSOR, activation=None)
        return Layer(name=name, weight=key, shape=info.shape, dtype=dtype, scheme=scheme, scale=None)
    _check_dtype(contents, found[0])
    layer = Layer(
        name=name,
        weight=key,
        shape=info.shape,
        dtype=dtype,
        scheme=Scheme(weight=TENSOR, activation=None),
        scale=found[0],
        scale_dtype=contents.tensors[found[0]].dtype,
    )
    return _with_scheme(contents, format, module, _with_scales(contents, format, module, layer), names)


def _with_scales(contents: Contents, format: Format, module: str, layer: Layer) -> Layer:
    """The layer with the granularity of its scales, and the shape that it has in the model.

    Raises:
        CheckpointError: the shapes do not fit.
    """
    assert layer.scale is not None
    shape, scale = layer.shape, contents.tensors[layer.scale]
    hints = _hints(contents, format, module, scale)
    arranged = format.arrangement(contents, layer.weight, layer.scale)
    if arranged is None:
        granularity = granularity_of(shape, scale.shape, hints) if len(shape) >= 2 else None
        if granularity is None and format.infers_blocks(contents, module):
            granularity = even_blocks(shape, scale.shape)
        if granularity is not None:
            if granularity == MX and not contents.config and len(shape) == 2:
                _refuse_either_order(layer, scale)
            return replace(layer, scheme=Scheme(weight=granularity, activation=None))
        if len(shape) == 3 and (split := halves(layer, scale.shape, hints)) is not None:
            return split
        arranged = partitions(contents, module, shape, scale.shape) or spread(shape, scale.shape)
    if arranged is None:
        raise CheckpointError(_wrong_shape(contents, layer.weight, layer.scale, hints))
    scheme = Scheme(weight=arranged.granularity, activation=None)
    return replace(layer, shape=arranged.shape, scheme=scheme, part=arranged.scale, arrange=arranged.data)


def _with_scheme(contents: Contents, format: Format, module: str, layer: Layer, names: Names) -> Layer:
    """The layer with its activation scheme from the format, and its remaining keys."""
    inputs = [module + suffix for suffix in names.input_scales if module + suffix in contents.tensors]
    asked = format.activation(contents, module, layer.granularity)
    static = bool(inputs) and asked.granularity is not None and asked.static is not False
    assert layer.scale is not None
    ue8m0 = format.ue8m0(contents, contents.tensors[layer.scale])
    scheme = Scheme(
        weight=layer.granularity,
        activation=TENSOR if static else asked.granularity,
        static=static,
        scale_format="ue8m0" if ue8m0 else "float32",
    )
    zero_points = tuple(module + suffix for suffix in names.zero_points if module + suffix in contents.tensors)
    return replace(layer, scheme=scheme, input_scale=inputs[0] if inputs else None, zero_points=zero_points)


def _hints(contents: Contents, format: Format, module: str, scale: TensorInfo) -> list[Granularity]:
    hints = list(format.granularities(contents, module))
    # OCP MX: one E8M0 byte per 32 elements, the only meaning of such a grid without a config.
    return [*hints, MX] if scale.dtype in UE8M0_DTYPES else hints


def _refuse_either_order(layer: Layer, scale: TensorInfo) -> None:
    """Raises CheckpointError for MX scales that could be row by row or in the tiles of tensor cores, 128 by 4."""
    if scale.shape[0] % 128 == 0 and scale.shape[1] % 4 == 0:
        raise CheckpointError(
            f"{layer.scale} has shape {list(scale.shape)}, which is that of MXFP8 scales both row by row and in tiles "
            "of 128 x 4; a config (quant_method mxfp8) or a description of the layer (comfy_quant) would tell which"
        )


def _check_dtype(contents: Contents, scale: str) -> None:
    found = contents.tensors[scale].dtype
    if found not in SCALE_DTYPES:
        raise CheckpointError(
            f"{scale} is {found}; a scale must be one of {', '.join(str(dtype) for dtype in SCALE_DTYPES)}"
        )


def _wrong_shape(contents: Contents, key: str, scale: str, hints: Sequence[Granularity]) -> str:
    shape = contents.tensors[key].shape
    said = {str(hint): list(hint.scale_shape(shape)) for hint in (*hints, TENSOR, ROW)} if len(shape) > 1 else {}
    fits = ", ".join(f"{name} has {grid}" for name, grid in said.items())
    return (
        f"{scale} has shape {list(contents.tensors[scale].shape)}, which fits no scale of {key} of shape "
        f"{list(shape)}: {fits}" + ("" if hints else "; a config with a block size (weight_block_size) would help")
    )
