"""FP8 tensors without a scale: values themselves where nothing else is possible, and else refused."""

from __future__ import annotations

import re
from functools import cached_property

import torch

from ..errors import CheckpointError
from .base import Contents, Format
from .beside import Surroundings

_DIGITS = re.compile(r"\d+")
# The bytes, without sign, of the largest value of each dtype. A scale maps the largest weight to it.
_LARGEST = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}


class RawCasts:
    """Decides which FP8 tensors without a scale may be read, with a scale of 1."""

    def __init__(self, contents: Contents, format: Format) -> None:
        self._contents = contents
        self._format = format
        self._allowed = format.allows_raw(contents)
        self._surroundings = Surroundings(contents)

    def check(self, key: str) -> None:
        """Raises CheckpointError unless the values of ``key`` are those that its bytes have without a scale."""
        info = self._contents.tensors[key]
        names, module = self._format.names_of(key)
        beside = [other for other in self._surroundings.unexplained(key, module) if not self._format.is_marker(other)]
        if beside:
            looked = ", ".join(module + suffix for suffix in names.scales)
            raise CheckpointError(
                f"{key} is {info.dtype} {list(info.shape)} and has no scale of a known name ({looked}), but "
                f"{', '.join(beside[:4])} may tell how to read it; if one is its scale, rename it to "
                f"{module + names.scales[0]}, where a scale multiplies"
            )
        if not self._allowed:
            raise CheckpointError(self._no_scale(key))
        if len(info.shape) < 2 or self._contents.raw or not self._scaled:
            return
        if _pattern(key) in self._scaled:
            raise CheckpointError(f"{self._no_scale(key)}. Tensors of the same name elsewhere in the model have one")
        if self._reaches_the_largest(key):
            raise CheckpointError(
                f"{self._no_scale(key)}. Its largest value is the largest of the dtype, as in scaled weights"
            )

    @cached_property
    def _scaled(self) -> set[str]:
        """The names of FP8 tensors that have a scale, without their numbers."""
        found = set()
        for key, info in self._contents.tensors.items():
            if self._format.fp8_dtype(key, info, self._contents) is not None:
                names, module = self._format.names_of(key)
                if any(module + suffix in self._contents.tensors for suffix in names.scales):
                    found.add(_pattern(key))
        return found

    def _reaches_the_largest(self, key: str) -> bool:
        dtype = self._format.fp8_dtype(key, self._contents.tensors[key], self._contents)
        if self._contents.read is None or dtype is None:
            return False
        magnitudes = self._contents.read(key).view(torch.uint8) & 0x7F
        return bool(magnitudes.numel()) and int(magnitudes.max()) == _LARGEST[dtype]

    def _no_scale(self, key: str) -> str:
        info = self._contents.tensors[key]
        names, module = self._format.names_of(key)
        looked = ", ".join(module + suffix for suffix in names.scales)
        return (
            f"{key} is {info.dtype} {list(info.shape)} and has no scale: looked for {looked}. Without one, its values "
            "are unknown; if it is a raw cast, whose bytes are the values, open_checkpoint(..., raw=True) reads it"
        )


def _pattern(key: str) -> str:
    return _DIGITS.sub("#", key)
