"""Pickling of FP8 weights and ``torch.save``: plain bytes, whatever engine has packed them."""

from __future__ import annotations

import copyreg
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from ..scaled import FP8GemmOptions, Granularity, ScaledTensor, Scheme
from .activity import Activity
from .chosen import ChosenExperts
from .geometry import Layout
from .home import Home
from .kept import watch
from .search import Search
from .sharding import Gathered, Sharded
from .stored import Stored, lock
from .weight import weight_from


def _reduced(home: Home) -> Any:
    """The bytes as uint8, since torch 2.13 cannot unpickle FP8 tensors."""
    if home.follows:
        home.settle()  # the parameter that it follows is not its own to pickle
    with lock():
        facts: dict[str, Any] = {
            "options": replace(home.options, generator=None),
            "layout": home.layout,
            "scheme": home.scheme,
            "trains": home.trains,
            "input_scale": home.input_scale,
            "search": home.search,
            "activity": home.activity,
            "owned": home.owned,
            "precision": home.precision,
            "original": None if home.follows else home.original,
            "behind": home.changed,
        }
        if home.stored is not None:
            plain = home.stored.scaled()
            facts |= {"bytes": plain.data.view(torch.uint8), "scale": plain.scale}
            facts["fp8"] = str(plain.data.dtype).removeprefix("torch.")
        if home.dense is not None and not home.dense_is_original():
            facts["dense"] = home.dense
        facts["writes"] = home.dense is not None
    return _rebuild, (facts,)


def _rebuild(facts: dict[str, Any]) -> Home:
    """The home that ``_reduced`` wrote."""
    stored = None
    if "bytes" in facts:
        data = facts["bytes"].view(getattr(torch, facts["fp8"]))
        stored = Stored(ScaledTensor(data, facts["scale"], facts["scheme"].weight))
    home = Home(facts["options"], facts["layout"], stored=stored, scheme=facts["scheme"], trains=facts["trains"])
    home.input_scale, home.activity, home.owned = facts["input_scale"], facts["activity"], facts["owned"]
    home.search = facts.get("search")  # which earlier versions did not write
    home.precision, original = facts.get("precision", "fp8"), facts["original"]
    if original is not None:
        watch(original)
        home.hold_original(original, behind=facts["behind"])
    if facts["writes"]:
        home.dense = facts.get("dense", None if original is None else original.detach())
    return home


for kind in (Home, ChosenExperts, Gathered):
    copyreg.pickle(kind, _reduced)

# What torch.load(weights_only=True) needs to rebuild a weight that was saved directly, for example a shard.
torch.serialization.add_safe_globals(
    [_rebuild, weight_from, Activity, Counter, FP8GemmOptions, Granularity, Layout, Scheme, Search, Sharded]
)
