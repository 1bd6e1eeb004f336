"""What stands beside an FP8 tensor without a scale: only where nothing does are its values what the file means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

from ..scaled import FP8_DTYPES
from .base import Contents, TensorInfo

# Parts of a key that scales, zero points and calibrated ranges of any tool have in their last names.
_LIKE_A_SCALE = ("scal", "amax", "absmax", "zero", "zp", "quant", "offset")
_SEPARATORS = re.compile(r"[._:@/-]")
# Names under which files for ComfyUI carry the tokenizer of a text encoder.
_TOKENIZERS = ("spiece_model", "tekken_model", "tokenizer_json")


def looks_like_a_scale(name: str) -> bool:
    """Whether the last name of a key is one that some tool gives to a scale."""
    return any(part in name.lower() for part in _LIKE_A_SCALE)


def is_aside(key: str, info: TensorInfo) -> bool:
    """Whether a tensor is no model's: a marker such as ``__index_timestep_zero__``, or a tokenizer's bytes."""
    last = key.rpartition(".")[2]
    if last.startswith("__") and last.endswith("__") and len(last) > 4:
        return True
    return last in _TOKENIZERS and info.dtype.itemsize == 1


class Surroundings:
    """The keys of a checkpoint by module, to find what stands beside one of its tensors."""

    def __init__(self, contents: Contents) -> None:
        self._tensors: Mapping[str, TensorInfo] = contents.tensors

    @cached_property
    def _attributes(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key in self._tensors:
            module, _, name = key.rpartition(".")
            found.setdefault(module, []).append(name)
        return found

    @cached_property
    def _like_scales(self) -> list[tuple[str, str]]:
        """Keys of which an end looks like a scale's, each also with one separator for all."""
        ends = ((key, key.partition(".")[0], key.rpartition(".")[2]) for key in self._tensors)
        return [
            (key, _spelled(key)) for key, first, last in ends if looks_like_a_scale(last) or looks_like_a_scale(first)
        ]

    def attributes(self, module: str, *, without: str) -> list[str]:
        """The keys of a module's own tensors other than ``without`` and biases."""
        keys = [f"{module}.{name}" if module else name for name in self._attributes.get(module, ())]
        return [key for key in keys if key != without and not key.endswith("bias")]

    def unexplained(self, key: str, module: str) -> list[str]:
        """The keys that may say how to read the FP8 tensor ``key`` of ``module``, though no format knows how.

        They are the module's own tensors, what is called after ``key``, and tensors of a fitting shape whose name is
        that of the module with a scale's before or after it. A parameter without a ``.weight`` is its own module.
        Vectors that are FP8 themselves are not among them: no scale of an FP8 weight is.
        """
        found = [] if key == module else self.attributes(module, without=key)
        found += [f"{key}.{name}" for name in self._attributes.get(key, ())]
        stems, shape = (_spelled(module), _spelled(key)), self._tensors[key].shape
        for other, spelled in self._like_scales:
            if other == key or other in found or not looks_like_a_scale(_rest(spelled, stems)):
                continue
            inside = module and other.startswith(f"{module}.")
            if inside or _could_scale(self._tensors[other], shape):
                found.append(other)
        return [other for other in found if not self._is_fp8_vector(other)]

    def _is_fp8_vector(self, key: str) -> bool:
        info = self._tensors[key]
        return info.dtype in FP8_DTYPES and len(info.shape) < 2


def _spelled(key: str) -> str:
    return f"_{_SEPARATORS.sub('_', key)}_"


def _rest(spelled: str, stems: tuple[str, ...]) -> str:
    """What a name has besides one of ``stems``, which it begins or ends with; empty if it does not."""
    for stem in stems:
        if spelled.startswith(stem):
            return spelled[len(stem) :]
        if spelled.endswith(stem):
            return spelled[: -len(stem)]
    return ""


def _could_scale(info: TensorInfo, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has the shape of scales per tensor, row or block of a weight of ``shape``."""
    if info.numel == 1:
        return True
    if len(info.shape) < 2:
        return info.numel == shape[0]
    return info.numel < TensorInfo(dtype=info.dtype, shape=shape).numel
