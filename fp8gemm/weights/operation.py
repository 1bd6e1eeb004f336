"""The operations ``fp8gemm::linear`` and ``fp8gemm::grouped``: products as tracers, modes and the profiler see them."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from ..engines import ENGINES, PackedWeight, restore
from ..scaled import Granularity, ScaledTensor, Scheme
from .activity import Activity
from .remembered import ACTIVITY, ALIGNMENT, CALLS, call_key, forget_bound, remembered_linear

# The attributes of a packed weight besides its bytes, in types that schemas support: a block of 0 means all rows or
# columns, an empty block means none. Arguments equal to their defaults are neither written into graphs nor converted.
_FORM: dict[str, tuple[str, Any]] = {
    "engine": ("str", "cpu"),
    "accumulate": ("str", "auto"),
    "weight_block": ("int[]", [1, 0]),
    "activation_block": ("int[]", []),
    "static": ("bool", False),
    "scale_format": ("str", "float32"),
    "extra": ("Tensor[]?", None),
    "extra_names": ("str", ""),  # joined by spaces, as torch.jit.trace does not support lists of strings
    "derive": ("bool", False),
}
_OF_LINEAR: dict[str, tuple[str, Any]] = {
    "bias": ("Tensor?", None),
    "input_scale": ("Tensor?", None),
    "x_scale": ("Tensor?", None),
    "x_block": ("int[]", []),
}
_DEFAULTS = {name: default for name, (_, default) in (_FORM | _OF_LINEAR).items()}


def _schema(arguments: dict[str, tuple[str, Any]]) -> str:
    return ", ".join(
        f"{kind} {name}={json.dumps(default) if kind == 'str' else default}"
        for name, (kind, default) in arguments.items()
    )


_library: Any = torch.library.Library("fp8gemm", "DEF")  # type: ignore[no-untyped-call]
_OPERANDS = "Tensor x, Tensor data, Tensor scale, int[] shape, ScalarType out_dtype"
_library.define(f"linear({_OPERANDS}, *, {_schema(_OF_LINEAR | _FORM)}) -> Tensor")
# Inductor passes every default, and converting twelve arguments takes 8 us. These overloads are for weights whose
# arguments are all defaults (row scales on the CPU engine), and for all others without derived tensors: their
# attributes are one text.
_library.define(f"linear.rows({_OPERANDS}, Tensor? bias) -> Tensor")
_library.define(f"linear.text({_OPERANDS}, str form, Tensor? bias, Tensor? input_scale, Tensor? x_scale) -> Tensor")
_library.define(f"grouped({_OPERANDS}, Tensor ends, *, {_schema(_FORM)}) -> Tensor")


def call_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    x_scale: torch.Tensor | None = None,
    x_grid: Granularity | None = None,
) -> torch.Tensor:
    """``y [M, N] = x [M, K] @ w.T + bias`` by the operation; ``x`` is FP8 if ``x_scale`` is given."""
    shape, scales = [weight.n, weight.k], {"x_scale": x_scale, "input_scale": weight.input_scale}
    form = _form(weight, bias=bias, x_block=_block(x_grid), **scales)
    operands = (x, weight.data, weight.scale, shape, out_dtype)
    if form.keys() <= {"bias"}:
        y: torch.Tensor = torch.ops.fp8gemm.linear.rows(*operands, bias)
    elif not weight.extra:
        y = torch.ops.fp8gemm.linear.text(*operands, _text(weight, x_grid), bias, weight.input_scale, x_scale)
    else:
        y = torch.ops.fp8gemm.linear.default(*operands, **form)
    return y


def call_grouped(x: torch.Tensor, weight: PackedWeight, ends: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """``Engine.grouped`` by the operation."""
    shape = [weight.experts, weight.n, weight.k]
    y: torch.Tensor = torch.ops.fp8gemm.grouped.default(
        x, weight.data, weight.scale, shape, out_dtype, ends, **_form(weight)
    )
    return y


def _form(weight: PackedWeight, **others: Any) -> dict[str, Any]:
    """The arguments of an operation in which ``weight`` differs from the defaults."""
    scheme = weight.scheme
    form = {
        "engine": weight.engine,
        "accumulate": weight.accumulate,
        "weight_block": _block(scheme.weight),
        "activation_block": _block(scheme.activation),
        "static": scheme.static,
        "scale_format": scheme.scale_format,
        "extra": list(weight.extra.values()) or None,
        "extra_names": " ".join(weight.extra),
        "derive": weight.bare,
        **others,
    }
    return {name: value for name, value in form.items() if _differs(value, _DEFAULTS[name])}


def _text(weight: PackedWeight, x_grid: Granularity | None) -> str:
    """The attributes of a weight without derived tensors, and the granularity of ``x``, for ``_attributes``."""
    scheme = weight.scheme
    blocks = [",".join(str(size) for size in _block(grid)) for grid in (scheme.weight, scheme.activation, x_grid)]
    flags = "static" if scheme.static else "", "derive" if weight.bare else ""
    return ";".join((weight.engine, weight.accumulate, scheme.scale_format, *flags, *blocks))


@cache
def _attributes(text: str) -> dict[str, Any]:
    """The keyword arguments of ``_linear_operation`` that ``_text`` wrote."""
    engine, accumulate, scale_format, static, derive, *texts = text.split(";")
    blocks = [[int(size) for size in block.split(",")] if block else [] for block in texts]
    form = dict(zip(("weight_block", "activation_block", "x_block"), blocks, strict=True))
    flags = {"static": bool(static), "derive": bool(derive)}
    return {"engine": engine, "accumulate": accumulate, "scale_format": scale_format, **flags, **form}


def _differs(value: Any, default: Any) -> bool:
    return value is not None if default is None else value != default


def _block(grid: Granularity | None) -> list[int]:
    return [] if grid is None else [grid.rows or 0, grid.cols or 0]


@cache
def _grid(*block: int) -> Granularity | None:
    return Granularity(block[0] or None, block[1] or None) if block else None


@cache
def _scheme(weight: tuple[int, ...], activation: tuple[int, ...], static: bool, scale_format: Any) -> Scheme:
    grid = _grid(*weight)
    assert grid is not None
    return Scheme(weight=grid, activation=_grid(*activation), static=static, scale_format=scale_format)


def _form_of(
    data: torch.Tensor,
    scale: torch.Tensor,
    shape: Sequence[int],
    *,
    engine: str = "cpu",
    accumulate: Any = "auto",
    weight_block: Sequence[int] = (1, 0),
    activation_block: Sequence[int] = (),
    static: bool = False,
    scale_format: str = "float32",
    extra: Sequence[torch.Tensor] | None = None,
    extra_names: str = "",
    derive: bool = False,
    input_scale: torch.Tensor | None = None,
) -> PackedWeight:
    """The packed weight from an operation's arguments; ``shape`` is ``[N, K]``, or ``[E, N, K]`` for a stack."""
    *experts, n, k = shape
    weight = PackedWeight(
        engine=engine,
        scheme=_scheme(tuple(weight_block), tuple(activation_block), static, scale_format),
        n=n,
        k=k,
        data=data,
        scale=scale,
        input_scale=input_scale,
        extra=dict(zip(extra_names.split(), extra or (), strict=True)),
        accumulate=accumulate,
        experts=experts[0] if experts else 0,
    )
    return _derived(weight) if derive else weight


def _linear_operation(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    shape: Sequence[int],
    out_dtype: torch.dtype,
    *,
    bias: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    x_block: Sequence[int] = (),
    **form: Any,
) -> torch.Tensor:
    """``Engine.linear``, or ``linear_quantized`` if ``x_scale`` is given."""
    if not x.is_contiguous():  # for example a zero tensor, which arrives as an expanded scalar
        x = x.contiguous()
    calls, activity = data.__dict__.get(CALLS), _counter(data)
    may_fit = x_scale is None and x.data_ptr() % ALIGNMENT == 0
    if calls and may_fit and (not form.get("derive") or _is_derived(data)):
        engine, accumulate = form.get("engine", "cpu"), form.get("accumulate", "auto")
        call = calls.get(call_key(x, out_dtype, engine, accumulate, data, scale, bias, input_scale))
        if call:
            compute, kernel = call
            if activity is not None:
                activity.count(kernel)
            y: torch.Tensor = compute(x)
            return y
    weight = _form_of(data, scale, shape, input_scale=input_scale, **form)
    if activity is not None:
        activity.count(ENGINES[weight.engine].kernel(x.shape[0], weight, out_dtype))
    if x_scale is None:
        return remembered_linear(x, weight, bias, out_dtype).contiguous()
    grid = _grid(*x_block)
    assert grid is not None
    return ENGINES[weight.engine].linear_quantized(ScaledTensor(x, x_scale, grid), weight, bias, out_dtype).contiguous()


class _Eager(threading.local):
    callers = 0  # how many products of this thread that call an operation outside of a graph are in progress


_eager = _Eager()


@contextmanager
def counted_by_caller() -> Iterator[None]:
    """While it lasts, operations of this thread count nothing: the product that calls them does."""
    _eager.callers += 1
    try:
        yield
    finally:
        _eager.callers -= 1


def _counter(data: torch.Tensor) -> Activity | None:
    """What counts the calls of a graph with these bytes."""
    activity: Activity | None = data.__dict__.get(ACTIVITY)
    return None if _eager.callers else activity


# Packed weights by the id of their bytes, with the version of those bytes: derived once per version.
_derivations: dict[int, tuple[weakref.ref[torch.Tensor], int, PackedWeight]] = {}


def _forget(table: dict[int, Any], key: int, gone: weakref.ref[torch.Tensor]) -> None:
    table.pop(key, None)


def _is_derived(data: torch.Tensor) -> bool:
    """Whether the packed weight of these bytes is derived from what they are now; its bound calls are then valid."""
    found = _derivations.get(id(data))
    return found is not None and found[0]() is data and found[1] == _version(data)


def _version(data: torch.Tensor) -> int:
    return 0 if data.is_inference() else data._version


def _derived(bare: PackedWeight) -> PackedWeight:
    """The packed weight with the tensors that its engine derives from the bytes."""
    data, key = bare.data, id(bare.data)
    if _is_derived(data):
        return _derivations[key][2]
    version = _version(data)
    engine = ENGINES[bare.engine]
    if bare.experts:
        form = engine.prepare_stack(restore(bare.split()), bare.scheme)
    else:
        form = engine.prepare(restore(bare), bare.scheme, input_scale=bare.input_scale)
    form = replace(form, accumulate=bare.accumulate)
    forget_bound(form.data)  # bound to what was derived before
    if not data.is_inference():
        _derivations[key] = (weakref.ref(data, partial(_forget, _derivations, key)), version, form)
    return form


def _grouped_operation(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    shape: Sequence[int],
    out_dtype: torch.dtype,
    ends: torch.Tensor,
    **form: Any,
) -> torch.Tensor:
    """``Engine.grouped``."""
    weight = _form_of(data, scale, shape, **form)
    engine = ENGINES[weight.engine]
    if (activity := _counter(data)) is not None:
        activity.count(engine.kernel(x.shape[0], weight, out_dtype))
    return engine.grouped(x.contiguous(), weight, ends, None, out_dtype).contiguous()


def _linear_by_rows(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    shape: Sequence[int],
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return _linear_operation(x, data, scale, shape, out_dtype, bias=bias)


def _linear_by_text(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    shape: Sequence[int],
    out_dtype: torch.dtype,
    form: str,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
) -> torch.Tensor:
    attributes = _attributes(form)
    return _linear_operation(
        x, data, scale, shape, out_dtype, bias=bias, input_scale=input_scale, x_scale=x_scale, **attributes
    )


_library.impl("linear.rows", _linear_by_rows, "CompositeExplicitAutograd")
_library.impl("linear.text", _linear_by_text, "CompositeExplicitAutograd")
_library.impl("linear", _linear_operation, "CompositeExplicitAutograd")
_library.impl("grouped", _grouped_operation, "CompositeExplicitAutograd")


@torch.library.register_fake("fp8gemm::linear", lib=_library)  # type: ignore[untyped-decorator]
@torch.library.register_fake("fp8gemm::linear.rows", lib=_library)  # type: ignore[untyped-decorator]
@torch.library.register_fake("fp8gemm::linear.text", lib=_library)  # type: ignore[untyped-decorator]
@torch.library.register_fake("fp8gemm::grouped", lib=_library)  # type: ignore[untyped-decorator]
def _(x: torch.Tensor, data: Any, scale: Any, shape: Sequence[int], out_dtype: torch.dtype, *_: Any, **__: Any) -> Any:
    return x.new_empty(x.shape[0], shape[-2], dtype=out_dtype)
