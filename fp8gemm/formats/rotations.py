"""Rotations that a config declares: weights are stored rotated, and inputs must be when the model runs."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAMES = re.compile(r"rotat|hadamard|spinquant|quarot|convrot", re.IGNORECASE)
# Sections whose keys are names of groups or of modules, or that a format reads itself.
_SKIPPED = ("config_groups", "transform_config")
_OFF = ("", "none", "null", "false", "identity", "disabled")


def rotation(config: Mapping[str, object]) -> str:
    """Why weights are not what a model multiplies with, if a config turns a rotation on; else empty."""
    where = declared(config)
    return where and (
        f"the config says {where}: weights are stored rotated, and inputs are rotated when the model runs, which is "
        "not done here; run it with the library that made it, or export it without rotations"
    )


def declared(config: Mapping[str, object], path: str = "") -> str:
    """Where a config turns a rotation on, such as ``modules_quant_config.up_proj.use_hadamard``; empty if nowhere."""
    for key, value in config.items():
        here = f"{path}.{key}" if path else str(key)
        if key in _SKIPPED:
            continue
        if _NAMES.search(str(key)) and _is_on(value):
            return here
        for index, part in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(part, Mapping):
                continue
            inside = f"{here}[{index}]" if isinstance(value, list) else here
            if found := (inside if _is_algorithm(part) else declared(part, inside)):
                return found
    return ""


def _is_on(value: object) -> bool:
    """Whether a setting turns something on; sizes do not, and no more does what is empty or off."""
    if isinstance(value, str):
        return value.lower() not in _OFF
    return bool(value) and (isinstance(value, bool) or not isinstance(value, (int, float)))


def _is_algorithm(entry: Mapping[str, object]) -> bool:
    """Whether an entry of a list of algorithms rotates inputs, as Quark's do.

    Quark's ``rotation`` multiplies its matrices into the stored weights, unless it says ``online``; QuaRot rotates the
    input of the last layer of each block (R4) by default.
    """
    name = str(entry.get("name") or entry.get("algorithm") or "")
    if not _NAMES.search(name):
        return False
    online = any("online" in key and _is_on(value) for key, value in entry.items())
    return online or _is_on(entry.get("r4", name.lower() != "rotation"))
