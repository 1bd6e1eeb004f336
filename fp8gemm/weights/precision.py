"""The precision of a weight's products: FP8, the same bytes with unquantized activations, or the kept original."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..engines import choose, probe
from ..errors import UnsupportedError
from ..scaled import Precision
from .home import Home
from .packed import prepare_for, spec_of
from .stored import Stored, lock


def original_values(home: Home, dtype: torch.dtype) -> torch.Tensor:
    """The dense values, in the parameter's own layout, of a weight whose products run on its original; not a copy
    where the original is on the weight's device and has this dtype.

    Raises:
        UnsupportedError: it has none, like a part that was copied out of such a weight.
    """
    dense = home.dense
    if dense is not None:
        return dense if dense.dtype == dtype else dense.to(dtype)
    if home.original is None:
        raise UnsupportedError(
            "the products of this weight run on its original, which it has not: it is a part or a copy of a weight "
            "whose precision is 'original'; call set_precision(model, pattern, 'fp8') first"
        )
    return home.values(dtype)


def refuse_original(home: Home) -> None:
    """Raises where a weight whose products run on its original is split: originals are not."""
    if home.precision == "original":
        raise UnsupportedError(
            "the products of this weight run on its original, which is not split: call set_precision(model, pattern, "
            "'fp8' or 'weight_only') before the model is"
        )


def refusal(home: Home, precision: Precision) -> str:
    """Why a weight cannot run at a precision; empty if it can."""
    if precision != "original" or (home.original is not None and not home.follows):
        return ""
    return f"its original was not kept: it was converted with fp16_weight_storage={home.options.fp16_weight_storage!r}"


def repacked(home: Home, precision: Precision, dtype: torch.dtype) -> Stored | None:
    """The weight as its engine packs it for a precision, from the same bytes; nothing is changed yet.

    None where there are no bytes yet.

    Raises:
        UnsupportedError: no engine, or not the requested one, runs this weight at that precision.
    """
    stored, scheme = home.settle() if home.stored is not None else None, home.scheme.at(precision)
    if scheme == home.scheme.at(home.precision):
        return stored
    if stored is None:
        if home.dense is not None and not home.is_meta:
            spec = spec_of(tuple(home.layout.shape), home.options, scheme, dtype)
            choose(spec, probe(home.device), home.options.engine)
        return None
    if (aside := home.aside) is not None:
        return aside
    if (packed := stored.packed) is not None and packed.scheme == replace(scheme, weight=packed.scheme.weight):
        return Stored(stored.plain, packed)  # its engine does not quantize activations in any case
    # New tensor objects, since calls that were bound for these bytes are kept with them.
    new = Stored(stored.scaled().detach())
    if stored.packed is not None:
        scale = home.input_scale if scheme.static else None
        new.hold(prepare_for(new.scaled(), home.options, dtype, scale, scheme))
    return new


def switch(home: Home, precision: Precision, stored: Stored | None) -> None:
    """Runs the products of a weight at a precision from now on, with what ``repacked`` gave for it."""
    with lock():
        former, alike = home.stored, home.scheme.at(precision) == home.scheme.at(home.precision)
        aside = home.aside if alike else former
        home.precision = precision
        if stored is not None:
            home.stored = stored
        home.touch()
        home.aside = aside


def carry_over(weight: Any, precision: Precision) -> None:
    """Gives the precision of a parameter to the values that replace its own.

    Raises:
        UnsupportedError: they have no original.
    """
    home = weight._home
    if home.precision == precision:
        return
    if problem := refusal(home, precision):
        raise UnsupportedError(
            f"FP8 bytes are no original, on which this weight runs ({problem}); call set_precision(model, pattern, "
            "'fp8') before it takes them"
        )
    switch(home, precision, repacked(home, precision, weight.dtype))
