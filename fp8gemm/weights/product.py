"""One product by an engine's form of a weight: a plain call in eager, an operation where somebody watches.

An operation is what torch.compile, torch.jit.trace, dispatch modes, the profiler and tensor subclasses can see; C only
sees plain memory. While compiling activations are rounded outside of it wherever the engine rounds them apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import native
from ..engines import ENGINES, PackedWeight, restore
from ..numerics import quantize
from ..scaled import Granularity, ScaledTensor, Scheme
from .lookup import dequantized

MOST_CALLS = 32  # that a weight keeps decided; one more and it starts again
ALIGNMENT = 16  # bytes, of inputs: what compiled kernels were specialized for


def multiply(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    version: Callable[[], int] | None = None,
) -> torch.Tensor:
    """``y [M, N] = x [M, K] @ w.T + bias [N]``, differentiable in ``x`` and ``bias``; the weight is frozen.

    ``version`` counts what was written to the weight: backward raises where that was something since forward.
    """
    if wants_derivative(x, bias):
        y: torch.Tensor = _Product.apply(x, bias, weight, out_dtype, version)  # type: ignore[no-untyped-call]
        return y
    return forward(x, weight, bias, out_dtype)


def wants_derivative(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether autograd has to see a product."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def in_forward_mode() -> bool:
    """Whether tangents of forward-mode differentiation may be on their way."""
    return forward_ad._current_level >= 0


def dense(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight ``[N, K]``, or stack, dequantized in float32 and rounded once to ``dtype``."""
    return dequantized(restore(weight), dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        weight: PackedWeight,
        out_dtype: torch.dtype,
        version: Callable[[], int] | None,
    ) -> torch.Tensor:
        ctx.weight, ctx.x_dtype, ctx.version = weight, x.dtype, version
        ctx.seen = None if version is None else version()
        ctx.bias_dtype = None if bias is None else bias.dtype
        return forward(x, weight, bias, out_dtype)

    @staticmethod
    def backward(ctx: Any, y_grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        if ctx.version is not None and ctx.version() != ctx.seen:
            raise RuntimeError(
                "an FP8 weight needed for gradient computation has been modified by an inplace operation since forward"
            )
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (y_grad.to(ctx.x_dtype) @ dense(ctx.weight, ctx.x_dtype)).to(ctx.x_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[1]:
            bias_grad = y_grad.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return x_grad, bias_grad, None, None, None


def forward(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """``multiply`` without derivatives."""
    engine = ENGINES[weight.engine]
    compiling = torch.compiler.is_compiling()
    if not compiling and not watched(x, weight.data, weight.scale, bias):
        return remembered_linear(x, weight, bias, out_dtype)
    if engine.traceable and not weight.bare:
        return engine.linear(x, weight, bias, out_dtype)
    rounding = weight.apart if compiling and _more_than(x.shape[0], weight.few) else None
    x_scale = None
    if rounding is not None:  # as plain operations, which the compiler fuses with those before them
        static = weight.input_scale if weight.scheme.static else None
        rounded = quantize(x, rounding, scale=static, scale_format=weight.scheme.scale_format)
        x, x_scale = rounded.data, rounded.scale
    operands = (x, x_scale, weight.data, weight.scale, weight.input_scale, list(weight.extra.values()), bias)
    y: torch.Tensor = torch.ops.fp8gemm.linear(*operands, *_facts(weight, rounding), weight.bare, out_dtype)
    return y


def remembered_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """``Engine.linear``; from the second time on that an ``x`` of this shape comes, by a call that was decided then.

    Decided calls lie beside the bytes that they are for, by the addresses of all that goes into them but ``x``.
    """
    data = weight.data
    if type(data) is not torch.Tensor or not x.is_contiguous() or x.data_ptr() % ALIGNMENT or not x.numel():
        return ENGINES[weight.engine].linear(x, weight, bias, out_dtype)
    others = (bias, weight.input_scale)
    key = _call_key(x, out_dtype, weight.engine, weight.accumulate, data, weight.scale, *others)
    calls: dict[Any, Any] = data.__dict__.setdefault("_fp8gemm_calls", {})
    call = calls.get(key)
    if call:
        y: torch.Tensor = call(x)
        return y
    if call is None:
        if len(calls) >= MOST_CALLS:
            calls.clear()
        # Bound the second time, as what comes once may never come again; False where an engine has nothing to bind.
        calls[key] = (ENGINES[weight.engine].bind(x, weight, bias, out_dtype) or False) if key in calls else None
    return ENGINES[weight.engine].linear(x, weight, bias, out_dtype)


def _call_key(
    x: torch.Tensor,
    out_dtype: torch.dtype,
    engine: str,
    accumulate: str,
    data: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
) -> tuple[Any, ...]:
    """What tells decided calls apart, beside the bytes of one weight."""
    bias_at = 0 if bias is None else bias.data_ptr()
    input_scale_at = 0 if input_scale is None else input_scale.data_ptr()
    ours = (data.data_ptr(), scale.data_ptr(), bias_at, input_scale_at)
    return (x.shape, x.dtype, out_dtype, engine, accumulate, *ours)


def grouped_forward(x: torch.Tensor, weight: PackedWeight, ends: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """``Engine.grouped`` for a stack, as an operation where somebody watches."""
    if not (torch.compiler.is_compiling() or watched(x, weight.data, weight.scale, ends)):
        return ENGINES[weight.engine].grouped(x, weight, ends, None, out_dtype)
    operands = (x, weight.data, weight.scale, list(weight.extra.values()), ends)
    facts = _facts(weight, None)
    y: torch.Tensor = torch.ops.fp8gemm.grouped(*operands, weight.experts, *facts, weight.bare, out_dtype)
    return y


profiling: Callable[[], bool] = torch._C._autograd._profiler_enabled


def watched(*tensors: torch.Tensor | None) -> bool:
    """Whether a product of these has to be an operation: somebody traces, counts or profiles, or C cannot read them."""
    return jit_tracing() or profiling() or not native.plain(*tensors)


def exporting() -> bool:
    """The flag behind ``torch.compiler.is_exporting()``, which torch 2.10's Dynamo takes for true in every trace."""
    return torch.compiler._is_exporting_flag


def jit_tracing() -> bool:
    """Whether torch.jit.trace is recording, to which anything but an operation of torch's is a constant."""
    return torch._C._get_tracing_state() is not None


def _more_than(m: int, few: int) -> bool:
    """Whether there are more than ``few`` tokens.

    Where their number is symbolic that is a guard, and a no where there can be none. An exported program has one graph,
    in which the engine decides when it runs, unless it decides alike for all.
    """
    if exporting():
        return few == 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # a slow import, and torch.compile has made it

    return bool(guard_or_false(m > few))


# --- the operations ------------------------------------------------------------------------------------------------

_FACTS = (
    "str engine, str accumulate, int[] shape, int[] weight_block, int[] activation_block, bool static, "
    "str scale_format, str extra_names, int[] x_block"
)
_library: Any = torch.library.Library("fp8gemm", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "linear(Tensor x, Tensor? x_scale, Tensor data, Tensor scale, Tensor? input_scale, Tensor[] extra, Tensor? bias, "
    f"{_FACTS}, bool derive, ScalarType out_dtype) -> Tensor"
)
_library.define(
    "grouped(Tensor x, Tensor data, Tensor scale, Tensor[] extra, Tensor ends, int experts, "
    f"{_FACTS}, bool derive, ScalarType out_dtype) -> Tensor"
)


def _facts(weight: PackedWeight, rounding: Granularity | None) -> tuple[Any, ...]:
    """What of a form is no tensor, in the types that a schema has; a block of 0 is all, no block is none.

    Names are joined by blanks, as torch.jit.trace has no lists of strings.
    """
    scheme = weight.scheme
    return (
        weight.engine,
        weight.accumulate,
        [weight.n, weight.k],
        _block(scheme.weight),
        _block(scheme.activation),
        scheme.static,
        scheme.scale_format,
        " ".join(weight.extra),
        _block(rounding),
    )


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
    input_scale: torch.Tensor | None,
    extra: list[torch.Tensor],
    experts: int,
    facts: tuple[Any, ...],
    derive: bool,
) -> PackedWeight:
    """The form that an operation was handed in pieces; ``facts`` as ``_facts`` gives them."""
    engine, accumulate, (n, k), weight_block, activation_block, static, scale_format, extra_names, _ = facts
    weight = PackedWeight(
        engine=engine,
        scheme=_scheme(tuple(weight_block), tuple(activation_block), static, scale_format),
        n=n,
        k=k,
        data=data,
        scale=scale,
        input_scale=input_scale,
        extra=dict(zip(extra_names.split(), extra, strict=True)),
        accumulate=accumulate,
        experts=experts,
    )
    return _derived(weight) if derive else weight


def _linear_operation(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    data: torch.Tensor,
    scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    extra: list[torch.Tensor],
    bias: torch.Tensor | None,
    *facts_and_how: Any,
) -> torch.Tensor:
    """``Engine.linear``, or ``linear_quantized`` where ``x`` comes with scales."""
    *facts, derive, out_dtype = facts_and_how
    if not x.is_contiguous():  # also one that was zero by decree: it comes here as one zero, expanded
        x = x.contiguous()
    calls = data.__dict__.get("_fp8gemm_calls")
    if calls and x_scale is None and not derive and x.data_ptr() % ALIGNMENT == 0:  # before anything is put together
        call = calls.get(_call_key(x, out_dtype, facts[0], facts[1], data, scale, bias, input_scale))
        if call:
            y: torch.Tensor = call(x)
            return y
    weight = _form_of(data, scale, input_scale, extra, 0, tuple(facts), derive)
    if x_scale is None:
        return remembered_linear(x, weight, bias, out_dtype).contiguous()
    grid = _grid(*facts[-1])
    assert grid is not None
    return ENGINES[weight.engine].linear_quantized(ScaledTensor(x, x_scale, grid), weight, bias, out_dtype).contiguous()


# Forms by the id of their bytes, with those bytes as they were counted: derived once for each change of them.
_derivations: dict[int, tuple[weakref.ref[torch.Tensor], int, PackedWeight]] = {}


def _forget(table: dict[int, Any], key: int, gone: weakref.ref[torch.Tensor]) -> None:
    table.pop(key, None)


def _derived(bare: PackedWeight) -> PackedWeight:
    """A form with what its engine derives from the bytes."""
    data, key = bare.data, id(bare.data)
    version = 0 if data.is_inference() else data._version
    found = _derivations.get(key)
    if found is not None and found[0]() is data and found[1] == version:
        return found[2]
    engine = ENGINES[bare.engine]
    if bare.experts:
        form = engine.prepare_stack(restore(bare.split()), bare.scheme)
    else:
        form = engine.prepare(restore(bare), bare.scheme, input_scale=bare.input_scale)
    form = replace(form, accumulate=bare.accumulate)
    if not data.is_inference():
        _derivations[key] = (weakref.ref(data, partial(_forget, _derivations, key)), version, form)
    return form


def _grouped_operation(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    extra: list[torch.Tensor],
    ends: torch.Tensor,
    experts: int,
    *facts_and_how: Any,
) -> torch.Tensor:
    """``Engine.grouped``."""
    *facts, derive, out_dtype = facts_and_how
    weight = _form_of(data, scale, None, extra, experts, tuple(facts), derive)
    return ENGINES[weight.engine].grouped(x.contiguous(), weight, ends, None, out_dtype).contiguous()


_library.impl("linear", _linear_operation, "CompositeExplicitAutograd")
_library.impl("grouped", _grouped_operation, "CompositeExplicitAutograd")


@torch.library.register_fake("fp8gemm::linear", lib=_library)  # type: ignore[untyped-decorator]
def _(x: torch.Tensor, *operands: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], operands[8][0], dtype=operands[-1])


@torch.library.register_fake("fp8gemm::grouped", lib=_library)  # type: ignore[untyped-decorator]
def _(x: torch.Tensor, *operands: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], operands[7][0], dtype=operands[-1])
