"""Classifies the keys that no FP8 layer uses: plain tensors, scales of something else, and what cannot be read."""

from __future__ import annotations

from ..scaled import BLOCK_128
from .base import LINEAR, Contents, Format, Layer, Layout, TensorInfo
from .codes import described, is_codes
from .experts import fused_scale_owner
from .kv import is_kv_scale
from .shapes import granularity_of

PACKED = (".weight_packed", ".qweight")
# What stands before "scale" in the names of scales whose weight is not in the file.
_OWNERS = ("weight", "input", "output", "act", "proj", "qdata", "w1", "w2", "w3")


def sort_the_rest(contents: Contents, format: Format, layout: Layout, used: set[str]) -> None:
    """Adds the keys not in ``used`` to ``layout``."""
    left = {key: info for key, info in contents.tensors.items() if key not in used and not format.is_marker(key)}
    others = _other_quantizations(contents, format, layout, left)
    quantized = contents.holds_fp8 or bool(contents.config)
    taken = {_suffix(layer) for layer in layout.layers.values()}
    for key, info in left.items():
        if key in others.values():
            continue
        owner = others.get(key.rpartition(".")[0]) if not key.endswith("bias") else None
        stray = _owner(contents, format, key, taken) if quantized and owner is None else None
        if owner is not None:
            layout.unused[key] = f"belongs to {owner}, which cannot be read"
        elif stray is not None:
            layout.unused[key] = f"{stray} is not FP8 ({contents.tensors[stray].dtype}): its scale is ignored"
        elif quantized and is_kv_scale(key, info, contents.model_config):
            layout.kv_scales[format.canonical(key)] = key
        else:
            layout.plain[format.canonical(key)] = key
            if quantized and _is_an_owners_scale(key.rpartition(".")[2]):
                layout.unknown.append(key)
    for name, beside in layout.companions.items():
        layout.suspicious.append(f"{' and '.join(beside)} beside the FP8 weight {name}: what they mean is not known")
    for name, reason in layout.unsupported.items():
        layout.suspicious.append(f"{name}: {reason}")


def is_part(contents: Contents, format: Format, key: str) -> bool:
    """Whether ``key`` is a scale or zero point of another tensor; those may be stored in FP8 too."""
    for names in format.names:
        for suffix in (*names.scales, *names.input_scales, *names.zero_points):
            if key.endswith(suffix):
                weight = key[: -len(suffix)] + names.weight
                if weight in contents.tensors or any(key[: -len(suffix)] + end in contents.tensors for end in PACKED):
                    return True
    return False


def _other_quantizations(
    contents: Contents, format: Format, layout: Layout, left: dict[str, TensorInfo]
) -> dict[str, str]:
    """Module -> key of each weight that is quantized to another type: INT8, FP4, packed INT4."""
    found = {}
    for key, info in left.items():
        _, module = format.names_of(key)
        packed = next((suffix for suffix in PACKED if key.endswith(suffix)), "")
        if packed:
            module = key.removesuffix(packed)
        name = format.canonical(f"{module}.weight" if packed else key)
        if name in layout.unsupported:
            found[module] = key
        elif packed or _is_another(contents, format, key, info):
            layout.unsupported[name] = described(key, info, _scale_of(contents, format, module))
            found[module] = key
    return found


def _is_another(contents: Contents, format: Format, key: str, info: TensorInfo) -> bool:
    """Whether ``key`` is a weight of integers or FP4."""
    names, module = format.names_of(key)
    if info.dtype.is_floating_point and info.dtype.itemsize > 1:
        return False
    if key.endswith(".weight") and is_codes(info):
        return True
    return bool(names.weight) and any(module + suffix in contents.tensors for suffix in names.scales)


def _scale_of(contents: Contents, format: Format, module: str) -> TensorInfo | None:
    """The scale beside a weight that is not FP8."""
    suffixes = {suffix for names in format.names for suffix in (*names.scales, *LINEAR.scales, ".scales")}
    return next((contents.tensors[module + end] for end in suffixes if module + end in contents.tensors), None)


def _suffix(layer: Layer) -> str:
    return "" if layer.scale is None else layer.scale.rpartition(".")[2]


def _owner(contents: Contents, format: Format, key: str, taken: set[str]) -> str | None:
    """The dense weight whose scale ``key`` would be: exporters leave scales beside weights that they did not quantize.

    Only matrices, and stacks of them, have such scales; other tensors of such names are a model's own parameters.
    """
    for names in format.names:
        for suffix in (*names.scales, *names.input_scales, *names.zero_points):
            # Some norms name their weight ".scale"; it is a scale only in files that use it as one.
            if not key.endswith(suffix) or (suffix == ".scale" and "scale" not in taken):
                continue
            module = key[: -len(suffix)]
            weight = module + names.weight
            if weight in contents.tensors and weight != key:
                info = contents.tensors[weight]
                wide = info.dtype.is_floating_point and info.dtype.itemsize > 1
                matrix = len(info.shape) >= (2 if names.weight else 3)
                hints = (*format.granularities(contents, module), BLOCK_128) if wide and matrix else ()
                fits = hints and granularity_of(info.shape, contents.tensors[key].shape, hints) is not None
                return weight if fits else None
    return fused_scale_owner(contents, key, reverse=True)


def _is_an_owners_scale(name: str) -> bool:
    """Whether the last part of a key is one that tools give to scales of weights and activations."""
    if name in ("scale_weight", "scale_input", "scale_output", "scale_inv", "weight_zero_point", "amax"):
        return True
    if name.startswith("qscale_") or name.endswith(("_scale_inv", "_scaling_factor", "_amax")):
        return True
    before = name.rpartition("scale")[0]
    return any(owner in before for owner in _OWNERS)
