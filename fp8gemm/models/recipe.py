"""Recipes: which scheme each layer of a model gets, or that it stays as it is; a plan that is kept in a JSON file."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ..scaled import SCHEMES, FP8GemmOptions, Granularity, Scheme, SchemeName

Treatment = Literal["original", "row", "tensor", "block", "weight_only"]
ORIGINAL: Literal["original"] = "original"
TREATMENTS = (ORIGINAL, *SCHEMES)
KEPT_BY_RECIPE = "kept by the recipe"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What ``enable_fp8_gemm(model, options=recipe)`` does with each layer.

    Attributes:
        options: for layers that are not named, and for everything but the scheme of those that are.
        layers: by the name of a layer, as in ``report(model)``: ``"original"`` keeps it, the name of a scheme
            converts it with that scheme. A layer that is named with a scheme is converted even if it is a router or
            an adapter, or an embedding table.

    Raises:
        ValueError: a layer is to be something else.

    Example:
        >>> from fp8gemm import enable_fp8_gemm, report
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> recipe = Recipe(layers={"2": "original"})
        >>> [row.reason for row in report(enable_fp8_gemm(model, options=recipe)).kept]
        ['kept by the recipe']
        >>> Recipe.from_dict(recipe.to_dict()) == recipe
        True
    """

    options: FP8GemmOptions = field(default_factory=FP8GemmOptions)
    layers: Mapping[str, Treatment] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.options, FP8GemmOptions):
            raise ValueError(f"options must be FP8GemmOptions, found {type(self.options).__name__}")
        if not isinstance(self.layers, Mapping):
            raise ValueError(f"layers must map names of layers to treatments, found {type(self.layers).__name__}")
        for name, treatment in self.layers.items():
            if not isinstance(name, str):
                raise ValueError(f"layers: the name of a layer must be a string, found {name!r}")
            if treatment not in TREATMENTS:
                raise ValueError(f"layers: {name!r} must be one of {', '.join(TREATMENTS)}, found {treatment!r}")

    @classmethod
    def of(cls, options: Options) -> Recipe:
        """What ``enable_fp8_gemm`` takes as its ``options``: a recipe, its dict, the path of its file, or options."""
        if isinstance(options, Recipe):
            return options
        if options is None or isinstance(options, FP8GemmOptions):
            return cls(options=options or FP8GemmOptions())
        return cls.from_dict(options) if isinstance(options, Mapping) else cls.load(options)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
        """The recipe that ``to_dict`` describes; ``source`` is what an error calls it.

        Raises:
            ValueError: a key is not known, or a value is not of its kind; the message names the entry.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"{source}: expected an object with options and layers, found {type(data).__name__}")
        if unknown := [repr(key) for key in data if key not in ("version", "options", "layers")]:
            raise ValueError(f"{source}: unknown entry {', '.join(unknown)}; known are version, options and layers")
        if (version := data.get("version", _VERSION)) != _VERSION or isinstance(version, bool):
            raise ValueError(f"{source}: version must be {_VERSION}, found {version!r}")
        try:
            return cls(options=_options(data.get("options", {})), layers=data.get("layers", {}))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The recipe in plain Python types.

        Raises:
            ValueError: the options have a random number generator, whose state is not written.
        """
        if self.options.generator is not None:
            raise ValueError("options.generator cannot be written to a recipe: give it when the recipe is used")
        values = {one.name: getattr(self.options, one.name) for one in fields(self.options) if one.name != "generator"}
        plain = {name: _plain(value) for name, value in values.items()}
        return {"version": _VERSION, "options": plain, "layers": dict(self.layers)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the recipe as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: the file cannot be read, is not JSON, or is not a recipe; the message names file and entry.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a recipe: {error}") from None
        return cls.from_dict(data, source=str(path))

    def treatment(self, names: Iterable[str]) -> Treatment | None:
        """What becomes of the weight that layers of these names share; None if none of them is named.

        Raises:
            ValueError: the recipe treats them differently.
        """
        found = {name: self.layers[name] for name in names if name in self.layers}
        if len(set(found.values())) > 1:
            said = ", ".join(f"{name} {treatment!r}" for name, treatment in found.items())
            raise ValueError(f"the recipe treats one tensor in several ways: {said} are tied")
        return next(iter(found.values()), None)


Options = FP8GemmOptions | Recipe | Mapping[str, Any] | str | os.PathLike[str] | None


def no_layer(name: str, known: Iterable[str]) -> str:
    """What is said of a layer that a recipe names and the model does not have."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3)
    shown = near or names[:5]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"the recipe names {name!r}, which the model has not; it has {', '.join(map(repr, shown))}{more}"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Granularity):
        return [value.rows, value.cols]
    if isinstance(value, Scheme):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    return value


def _options(data: object) -> FP8GemmOptions:
    if not isinstance(data, Mapping):
        raise ValueError(f"options must be an object, found {type(data).__name__}")
    defaults = FP8GemmOptions()
    known = [one.name for one in fields(defaults) if one.name != "generator"]
    if unknown := [repr(key) for key in data if key not in known]:
        raise ValueError(f"options: unknown entry {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        return FP8GemmOptions(**{name: _value(name, found, getattr(defaults, name)) for name, found in data.items()})
    except ValueError as error:
        raise ValueError(f"options: {error}") from None


def _value(name: str, found: object, default: object) -> Any:
    """A value of the options from its plain form, which is of the default's kind."""
    if isinstance(default, torch.dtype):
        dtype = getattr(torch, found, None) if isinstance(found, str) else None
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} must be the name of a dtype, such as 'float8_e4m3fn', found {found!r}")
        return dtype
    if name == "scheme" and isinstance(found, Mapping):
        return _scheme(found)
    if type(found) is not type(default):
        raise ValueError(f"{name} must be of type {type(default).__name__}, found {found!r}")
    return found


def _scheme(data: Mapping[str, Any]) -> SchemeName | Scheme:
    known = [one.name for one in fields(Scheme)]
    if wrong := [repr(key) for key in data if key not in known]:
        raise ValueError(f"scheme: unknown entry {', '.join(wrong)}; known are {', '.join(known)}")
    if "weight" not in data or "activation" not in data:
        raise ValueError(f"scheme needs weight and activation, found {', '.join(data) or 'neither'}")
    activation = data["activation"]
    static, scale_format = data.get("static", False), data.get("scale_format", "float32")
    if not isinstance(static, bool) or scale_format not in ("float32", "ue8m0"):
        raise ValueError(f"scheme: static is true or false, and scale_format float32 or ue8m0, found {dict(data)}")
    return Scheme(
        weight=_granularity(data["weight"]),
        activation=None if activation is None else _granularity(activation),
        static=static,
        scale_format=scale_format,
    )


def _granularity(found: object) -> Granularity:
    sizes = list(found) if isinstance(found, (list, tuple)) else []
    if len(sizes) != 2 or not all(size is None or type(size) is int for size in sizes):
        raise ValueError(f"scheme: a granularity is [rows, columns], where null means all, found {found!r}")
    return Granularity(*sizes)
