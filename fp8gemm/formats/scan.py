"""Classifies the keys of a checkpoint: the tensors decide, the config confirms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ..errors import CheckpointError
from ..scaled import MX, ROW, TENSOR, Granularity, Scheme
from .arrangements import spread
from .base import LINEAR, SCALE_DTYPES, UE8M0_DTYPES, Contents, Format, Layer, Layout, Names, TensorInfo
from .codes import described, is_codes
from .companions import Neighbors, parts
from .experts import fused_layer, fused_scale_owner, halves

_KV_SCALE = re.compile(
    r"\.((q|k|v|kv|qk|attn|prob|softmax|k_cache|v_cache)_(scale|zero_point)|(q|k|v|o|kv|qkv)_proj\.output_scale)$"
)
_LIKE_A_SCALE = re.compile(
    r"(weight|input|output|act|activation|proj|qdata|w[123]|w13)_?\w*scale\w*$|qscale_\w+$|scale_(weight|input|output)$"
    r"|scale_inv$|weight_zero_point$|(^|[._])amax$"
)
_PACKED = (".weight_packed", ".qweight")


def scan(contents: Contents, format: Format) -> Layout:
    """Finds out what each key is.

    Raises:
        CheckpointError: FP8 without a scale, a scale of the wrong shape or dtype, or two scales for one weight.
    """
    layout = Layout()
    used: set[str] = set()
    raw = format.allows_raw(contents)
    neighbors = Neighbors(contents, format)
    for key, info in contents.tensors.items():
        dtype = format.fp8_dtype(key, info, contents)
        if dtype is None or format.is_marker(key) or _is_part(contents, format, key):
            continue
        names, module = _names_of(key, format)
        if reason := neighbors.reason(key, names, module):
            layout.unsupported[format.canonical(key)] = reason
            used.update((key, *parts(contents, names, module)))
            continue
        layer = _layer(contents, format, key, raw)
        if layer is None:
            continue
        layout.layers[layer.name] = layer
        used.update(part for part in (key, layer.scale, layer.input_scale, *layer.zero_points) if part)
        if layer.scale is not None and (beside := neighbors.unknown(key, names, module)):
            layout.companions[layer.name] = beside
    _sort_the_rest(contents, format, layout, used)
    format.check(contents, layout)
    return layout


def granularity_of(
    shape: tuple[int, ...], grid: tuple[int, ...], hints: Sequence[Granularity] = ()
) -> Granularity | None:
    """The granularity of scales of shape ``grid`` for a weight of ``shape [..., N, K]``; None if none fits.

    Block sizes are never guessed from the two shapes: they come only from ``hints``, which a config gives.
    """
    lead, (n, k) = shape[:-2], shape[-2:]
    if len(shape) == 2 and len(grid) == 4 and grid[1] == grid[3] == 1:
        grid = (grid[0], grid[2])
    for hint in hints:
        if hint.scale_shape(shape) == grid:
            return hint
        # Transposed experts [E, K, N] may also store their scales as (E, N, 1).
        if hint == Granularity(None, 1) and lead and grid == (*lead, k, 1):
            return hint
    if all(size == 1 for size in grid) or grid in (lead, (*lead, 1), (*lead, 1, 1)):
        return TENSOR
    if grid in ((*lead, n), (*lead, n, 1)):
        return ROW
    if lead and grid == (*lead, 1, k):  # transposed experts [E, K, N] with one scale per output
        return Granularity(None, 1)
    return None


def _layer(contents: Contents, format: Format, key: str, raw: bool) -> Layer | None:
    """The FP8 layer whose weight is ``key``; None for a raw cast that is not a matrix."""
    info = contents.tensors[key]
    dtype = format.fp8_dtype(key, info, contents)
    assert dtype is not None
    names, module = _names_of(key, format)
    name = format.canonical(key)
    found = [module + suffix for suffix in names.scales if module + suffix in contents.tensors]
    if len(found) > 1:
        raise CheckpointError(f"{key} has {len(found)} scales, {' and '.join(found)}; only one is allowed")
    if raw and not found:
        if len(info.shape) != 2:
            return None
        scheme = Scheme(weight=TENSOR, activation=None)
        return Layer(name=name, weight=key, shape=info.shape, dtype=dtype, scheme=scheme, scale=None)
    if not found:
        fused = fused_scale_owner(contents, key)
        if fused is None:
            raise CheckpointError(_no_scale(key, info, module, names))
        hints = _hints(contents, format, module, contents.tensors[fused])
        layer = fused_layer(contents, name, key, dtype, fused, hints, granularity_of)
        return _with_scheme(contents, format, module, layer, names)
    _check_dtype(contents, found[0])
    grid = contents.tensors[found[0]].shape
    hints = _hints(contents, format, module, contents.tensors[found[0]])
    layer = Layer(
        name=name,
        weight=key,
        shape=info.shape,
        dtype=dtype,
        scheme=Scheme(weight=TENSOR, activation=None),
        scale=found[0],
        scale_dtype=contents.tensors[found[0]].dtype,
    )
    return _with_scheme(contents, format, module, _placed(contents, format, layer, grid, hints), names)


def _placed(
    contents: Contents, format: Format, layer: Layer, grid: tuple[int, ...], hints: Sequence[Granularity]
) -> Layer:
    """The layer with the granularity of its scales of shape ``grid``, and the shape that it has in the model."""
    shape = layer.shape
    assert layer.scale is not None
    arranged = format.arrangement(contents, layer.weight, layer.scale)
    if arranged is None:
        if len(shape) >= 2 and (granularity := granularity_of(shape, grid, hints)) is not None:
            return replace(layer, scheme=Scheme(weight=granularity, activation=None))
        if len(shape) == 3 and (split := halves(layer, grid, hints)) is not None:
            return split
        arranged = spread(shape, grid)
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


def _names_of(key: str, format: Format) -> tuple[Names, str]:
    """The naming that ``key`` follows, and its module."""
    for names in format.names:
        if names.weight and key.endswith(names.weight):
            return names, key[: -len(names.weight)]
    bare = next((names for names in format.names if not names.weight), format.names[0])
    return bare, key


def _hints(contents: Contents, format: Format, module: str, scale: TensorInfo) -> list[Granularity]:
    hints = list(format.granularities(contents, module))
    # OCP MX: one E8M0 byte per 32 elements, the only meaning of such a grid without a config.
    return [*hints, MX] if scale.dtype in UE8M0_DTYPES else hints


def _sort_the_rest(contents: Contents, format: Format, layout: Layout, used: set[str]) -> None:
    """Classifies the keys that no FP8 layer uses."""
    taken_suffixes = {_suffix(layer) for layer in layout.layers.values()}
    for key, info in contents.tensors.items():
        if key in used or format.is_marker(key):
            continue
        owner = _owner(contents, format, key, taken_suffixes)
        if owner is not None:
            layout.unused[key] = f"{owner} is not FP8 ({contents.tensors[owner].dtype}): its scale is ignored"
        elif _KV_SCALE.search(key):
            layout.kv_scales[format.canonical(key)] = key
        elif _is_other_quantization(contents, format, key, info):
            name = format.canonical(re.sub(r"\.(weight_packed|qweight)$", ".weight", key))
            layout.unsupported[name] = described(key, info, _scale_of(contents, format, key))
        elif reason := _dense_unreadable(contents, format, key, info):
            layout.unsupported[format.canonical(key)] = reason
        else:
            layout.plain[format.canonical(key)] = key
            if _LIKE_A_SCALE.search(key):
                layout.unknown.append(key)
    for name, beside in layout.companions.items():
        layout.suspicious.append(f"{' and '.join(beside)} beside the FP8 weight {name}: what they mean is not known")
    for name, reason in layout.unsupported.items():
        layout.suspicious.append(f"{name}: {reason}")


def _dense_unreadable(contents: Contents, format: Format, key: str, info: TensorInfo) -> str:
    """Why a dense matrix is not what the model multiplies with."""
    matrix = key.endswith(".weight") and len(info.shape) == 2
    return format.unreadable(contents, key.removesuffix(".weight")) if matrix else ""


def _suffix(layer: Layer) -> str:
    return "" if layer.scale is None else layer.scale.rpartition(".")[2]


def _is_part(contents: Contents, format: Format, key: str) -> bool:
    """Whether ``key`` is a scale or zero point of another tensor; those may be stored in FP8 too."""
    for names in format.names:
        for suffix in (*names.scales, *names.input_scales, *names.zero_points):
            if key.endswith(suffix):
                weight = key[: -len(suffix)] + names.weight
                if weight in contents.tensors or any(key[: -len(suffix)] + end in contents.tensors for end in _PACKED):
                    return True
    return False


def _owner(contents: Contents, format: Format, key: str, taken: set[str]) -> str | None:
    """The weight that the scale ``key`` belongs to, if that weight is not FP8."""
    for names in format.names:
        for suffix in (*names.scales, *names.input_scales, *names.zero_points):
            # Some norms name their weight ".scale"; it is a scale only in files that use it as one.
            if not key.endswith(suffix) or (suffix == ".scale" and "scale" not in taken):
                continue
            weight = key[: -len(suffix)] + names.weight
            if weight in contents.tensors and weight != key:
                info = contents.tensors[weight]
                return weight if info.dtype.is_floating_point and info.dtype.itemsize > 1 else None
    return fused_scale_owner(contents, key, reverse=True)


def _is_other_quantization(contents: Contents, format: Format, key: str, info: TensorInfo) -> bool:
    """Whether ``key`` is a weight quantized to another type: INT8, FP4, packed INT4."""
    if key.endswith(_PACKED):
        return True
    names, module = _names_of(key, format)
    if info.dtype.is_floating_point and info.dtype.itemsize > 1:
        return False
    if key.endswith(".weight") and is_codes(info):
        return True
    return bool(names.weight) and any(
        module + suffix in contents.tensors for suffix in names.scales if key.endswith(names.weight)
    )


def _scale_of(contents: Contents, format: Format, key: str) -> TensorInfo | None:
    """The scale beside a weight that is not FP8."""
    names, module = _names_of(key, format)
    module = next((key.removesuffix(end) for end in _PACKED if key.endswith(end)), module)
    suffixes = (*names.scales, *LINEAR.scales, ".scales")
    return next((contents.tensors[module + end] for end in suffixes if module + end in contents.tensors), None)


def _check_dtype(contents: Contents, scale: str) -> None:
    found = contents.tensors[scale].dtype
    if found not in SCALE_DTYPES:
        raise CheckpointError(
            f"{scale} is {found}; a scale must be one of {', '.join(str(dtype) for dtype in SCALE_DTYPES)}"
        )


def _no_scale(key: str, info: TensorInfo, module: str, names: Names) -> str:
    looked = ", ".join(module + suffix for suffix in names.scales)
    return (
        f"{key} is {info.dtype} {list(info.shape)} and has no scale: looked for {looked}. Without one, its values are "
        "unknown; only single files with neither a config nor any scale are read as raw casts"
    )


def _wrong_shape(contents: Contents, key: str, scale: str, hints: Sequence[Granularity]) -> str:
    shape = contents.tensors[key].shape
    said = {str(hint): list(hint.scale_shape(shape)) for hint in (*hints, TENSOR, ROW)} if len(shape) > 1 else {}
    fits = ", ".join(f"{name} has {grid}" for name, grid in said.items())
    return (
        f"{scale} has shape {list(contents.tensors[scale].shape)}, which fits no scale of {key} of shape "
        f"{list(shape)}: {fits}" + ("" if hints else "; a config with a block size (weight_block_size) would help")
    )
