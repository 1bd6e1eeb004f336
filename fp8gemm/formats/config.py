"""Where a checkpoint keeps its quantization config: in config.json, in a file of its own or in the files' headers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

# Files that hold nothing but a quantization config; the first that exists counts.
OWN_FILES = ("hf_quant_config.json", "quantization_config.json", "quant_config.json", "quantize_config.json")

_NAMES = ("quantization_config", "compression_config")
# Keys of a header under which exporters store a config as JSON; ModelOpt writes the first.
_METADATA = ("quantization_config", "hf_quant_config", "quant_config", "config")
_DESCRIBES = ("quant_method", "quant_algo", "quantization", "config_groups", "weight_block_size")
# A config of a model that is part of a model that is part of another, at most: text_config.llm_config.
_DEPTH = 3


def quantization_config(
    config: Mapping[str, Any] | None, own: Mapping[str, Any] | None, metadata: Mapping[str, str]
) -> Mapping[str, Any]:
    """The quantization config; empty if there is none.

    Args:
        config: config.json, in which it may belong to a part of the model.
        own: a file that holds only the quantization config.
        metadata: from the files' headers.
    """
    for found in (_within(config), _whole(own), *(_stored(metadata, name) for name in _METADATA)):
        if found:
            return found
    return {}


def _within(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The quantization config of a model, or of the first of its parts that has one."""
    for holder in _sections(config or {}):
        for name in _NAMES:
            if isinstance(found := holder.get(name), Mapping) and found:
                return found
    return {}


def _sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config and the configs in it, outer before inner."""
    level = [config]
    for _ in range(_DEPTH):
        yield from level
        level = [value for section in level for value in section.values() if isinstance(value, Mapping)]


def _whole(own: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A config that stands alone, if it describes a quantization."""
    if inner := _within(own):
        return inner
    return own if own and any(key in own for key in _DESCRIBES) else {}


def _stored(metadata: Mapping[str, str], name: str) -> Mapping[str, Any]:
    """The config that a header stores as ``name``."""
    try:
        found = json.loads(metadata.get(name, "null"))
    except (ValueError, RecursionError):
        return {}  # other software's own text
    return _whole(found) if isinstance(found, Mapping) else {}
