"""Taking a weight apart into the plain tensors that a traced graph receives, and putting it together again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import native
from ..engines import PackedWeight
from ..scaled import FP8GemmOptions, Precision, ScaledTensor, Scheme
from .chosen import ChosenExperts
from .geometry import Layout
from .home import Home
from .precision import original_values
from .remembered import count_for
from .stored import Stored


class Flatten:
    """``__tensor_flatten__``, hidden on tensors that a cast or a move has just created.

    nn.Module._apply uses ``swap_tensors`` for parameters that define it, and that fails if a weak reference to the
    parameter exists. Without it, nn.Module assigns ``parameter.data = moved`` instead.
    """

    def __get__(self, weight: Any, kind: Any) -> Any:
        if weight is None:
            return kind._flatten
        if weight.__dict__.get("_fresh"):
            raise AttributeError("__tensor_flatten__")
        return weight._flatten


@dataclass(frozen=True)
class Context:
    """The part of a home that is not a tensor; guards compare it."""

    options: FP8GemmOptions
    scheme: Scheme
    layout: Layout
    owned: bool
    packed: tuple[Any, ...] | None  # of the engine's packed weight, without its tensors
    precision: Precision = "fp8"

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        return self  # guards keep a copy, and compare by identity first


def flatten_home(home: Home, dtype: torch.dtype) -> tuple[list[str], Context]:
    """The names of the attributes that hold the tensors, and the rest as a ``Context``.

    A weight that an engine has packed is handed over packed, without the tensors that the engine derives from it;
    chosen experts are handed over as their stack and the indices.
    """
    if isinstance(home, ChosenExperts) and (source := home.source) is not None:
        names, context = flatten_home(source, dtype)
        for name in names:
            setattr(home, name.removeprefix("_"), getattr(source, name.removeprefix("_")))
        home.inner_ids = home.ids
        return [*names, "_inner_ids"], context
    if home.flat is not None and not home.pending:  # guards ask at every call
        return home.flat
    if home.precision == "original":
        home.inner_dense = original_values(home, dtype)
        names = ["_inner_dense"]
        context = Context(home.options, home.scheme, home.layout, home.owned, None, home.precision)
        home.flat = (names, context) if native.plain(home.inner_dense) else None
        return names, context
    stored = home.settle()
    if stored is not None and stored.packed is None and native.plain(stored.scaled().data) and not home.is_meta:
        home.form(dtype)
    if stored is None:  # a temporary copy that was written to is really dense
        assert home.dense is not None
        home.inner_dense = home.dense
        return ["_inner_dense"], Context(home.options, home.scheme, home.layout, False, None)
    packed = stored.packed
    facts = None
    if packed is None:
        plain = stored.scaled()
        home.inner_data, home.inner_scale = plain.data, plain.scale
    else:
        home.inner_data, home.inner_scale = packed.data, packed.scale
        facts = (
            packed.engine,
            packed.scheme,
            packed.n,
            packed.k,
            packed.dtypes,
            packed.accumulate,
            packed.apart,
            packed.few,
            packed.experts,
            packed.bare or len(packed.extra) > 0,
            stored.plain is not None,
        )
    if native.plain(home.inner_data):
        count_for(home.activity, home.inner_data)
    names = ["_inner_data", "_inner_scale"]
    if home.input_scale is not None:
        names.append("_inner_input_scale")
        home.inner_input_scale = home.input_scale
    context = Context(home.options, home.scheme, home.layout, home.owned, facts, home.precision)
    if native.plain(home.inner_data):
        home.flat = (names, context)
    return names, context


def unflatten_home(tensors: dict[str, torch.Tensor], context: Context) -> Home:
    """Rebuilds the home that ``flatten_home`` took apart."""
    if "_inner_ids" in tensors:
        of_stack = {name: tensor for name, tensor in tensors.items() if name != "_inner_ids"}
        return ChosenExperts(unflatten_home(of_stack, context), tensors["_inner_ids"])
    input_scale = tensors.get("_inner_input_scale")
    home = Home(context.options, context.layout, scheme=context.scheme, input_scale=input_scale)
    home.owned, home.precision = context.owned, context.precision
    if "_inner_dense" in tensors:
        home.dense = tensors["_inner_dense"]
        return home
    data, scale = tensors["_inner_data"], tensors["_inner_scale"]
    if context.packed is None:
        home.stored = Stored(ScaledTensor(data, scale, context.scheme.weight))
        return home
    engine, scheme, n, k, dtypes, accumulate, apart, few, experts, bare, plain = context.packed
    packed = PackedWeight(
        engine=engine,
        scheme=scheme,
        n=n,
        k=k,
        data=data,
        scale=scale,
        input_scale=input_scale,
        dtypes=dtypes,
        accumulate=accumulate,
        apart=apart,
        few=few,
        experts=experts,
        bare=bare,
    )
    if experts:
        packed = packed.split()
    home.stored = Stored(ScaledTensor(data, scale, context.scheme.weight) if plain else None, packed)
    return home


def graph_key(weight: Any) -> str:
    """What torch's cache of compiled graphs on disk knows a weight by: everything that a graph with it depends on."""
    names, context = weight._flatten()
    inner = [(name, getattr(weight, name)) for name in names]
    facts = [(name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for name, tensor in inner]
    return hashlib.sha256(repr((_source(), context, weight.size(), facts)).encode()).hexdigest()


@cache
def _source() -> str:
    """A hash of this package's code, which decides what graphs contain."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def never_traced(*functions: Callable[..., Any]) -> None:
    """Keeps torch.compile from compiling these functions, and what they call, as graphs of their own.

    An operation at which a graph breaks runs in eager, and Dynamo would take up every Python frame below it. Functions
    that are called within a graph are traced all the same.
    """
    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameExecStrategy(dynamo._FrameAction.SKIP, dynamo._FrameAction.SKIP)
    for function in functions:
        dynamo.set_code_exec_strategy(function.__code__, skip)
