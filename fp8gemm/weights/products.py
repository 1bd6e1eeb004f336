"""Matrix products with a weight or a view: one FP8 product where the view consists of whole rows of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .. import native
from ..engines import ENGINES
from .activity import ORIGINAL_KERNEL
from .chosen import ChosenExperts
from .dispatch import FUNCTIONS, OPERATIONS, implements
from .einsum import FoldedEinsum, batched_operands, folded_operands
from .home import Home
from .product import forward as engine_forward
from .product import grouped_forward, in_forward_mode, wants_derivative
from .remembered import bias_key, remember
from .values import read_of, taken_by_value
from .watching import exporting_to_onnx, jit_tracing
from .weight import FP8Weight

aten = torch.ops.aten


def linear(x: torch.Tensor, weight: FP8Weight, bias: torch.Tensor | None = None) -> Any:
    """``x [..., K] @ weight[N, K].T + bias [N]`` on an engine; NotImplemented unless ``weight`` is a range of whole
    rows."""
    if x.is_nested or x.layout != torch.strided or taken_by_value(weight):
        return NotImplemented
    home = weight._home
    calls, key = home.calls, None  # of this version: a write that another thread makes now gives the home others
    if type(x) is torch.Tensor and type(home) is Home and not torch.compiler.is_compiling() and not home.pending:
        geometry = (weight.size(), weight.stride(), weight.offset, weight.dtype)
        key = (*geometry, x.shape, x.dtype, bias_key(bias))
        if (call := calls.get(key)) and call.fits(x, bias):
            home.activity.count(call.kernel)
            return call.compute(x)
    part = weight.part()
    if part is None or isinstance(x, FP8Weight) or weight.dim() != 2:
        return NotImplemented
    if not part.all_columns(home.layout) or part.flipped or not x.is_floating_point():
        return NotImplemented
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k or x.dtype != weight.dtype or x.device != weight.device:
        return NotImplemented  # torch raises its own error
    if x.is_meta:
        return x.new_empty(*x.shape[:-1], n)
    form = home.form(x.dtype, x.device, part)
    if form is None:
        return NotImplemented
    run_dtype = form.dtype_for(x.dtype)
    rows = x.reshape(-1, k).to(run_dtype).contiguous()
    y = engine_forward(rows, form, bias, run_dtype)
    if _runs(rows):
        kernel = ENGINES[form.engine].kernel(rows.shape[0], form, run_dtype)
        home.activity.count(kernel)
        if key is not None and x.dtype == run_dtype:
            remember(calls, key, x, form, bias, kernel)
    return y.view(*x.shape[:-1], n).to(x.dtype)


def _runs(rows: torch.Tensor) -> bool:
    """Whether a product is computed now, and not traced for any number of tokens."""
    return not torch.compiler.is_compiling() and isinstance(rows.shape[0], int)


@implements(FUNCTIONS, F.linear)
def _linear_directly(input: Any, weight: Any, bias: torch.Tensor | None = None, **others: Any) -> Any:
    """A shortcut past the dispatcher, where nothing else intercepts the call."""
    if others or not isinstance(weight, FP8Weight) or not _is_ours_alone(input, bias):
        return NotImplemented
    if getattr(weight, "_is_param", False):
        weight._home.owned = True
    if weight._home.precision == "original":
        weight._home.activity.count(ORIGINAL_KERNEL)
        return F.linear(input, read_of(weight), bias)
    return linear(input, weight, bias)


@implements(FUNCTIONS, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
def _matmul_directly(input: Any = None, weight: Any = None, *others: Any, **named: Any) -> Any:
    """As above; a product with named operands, or with ``out``, goes through the dispatcher."""
    if others or named or not isinstance(weight, FP8Weight) or weight.dim() != 2 or not _is_ours_alone(input, None):
        return NotImplemented
    return linear(input, weight.turned_around())


@implements(FUNCTIONS, torch.Tensor.t, torch.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__)  # type: ignore[attr-defined]
def _transpose(input: FP8Weight) -> Any:
    """A shortcut past the dispatcher, which autograd need not see: ``x @ weight.T`` transposes at every call."""
    if input.dim() != 2 or torch.is_grad_enabled() or torch.compiler.is_compiling() or not native.plain():
        return NotImplemented
    return input.turned_around()


@implements(OPERATIONS, aten.t.default)
def _turned(weight: Any) -> Any:
    """The shortest way to the first step of autograd's ``F.linear``; other views take torch's slower general way."""
    return weight.turned_around() if weight.dim() == 2 else NotImplemented


def _is_ours_alone(x: Any, bias: torch.Tensor | None) -> bool:
    """Whether no autograd, tracer, mode, functional transform or autocast intercepts a product."""
    return not (
        torch.compiler.is_compiling()
        or not native.plain(x, bias)
        or x.is_meta
        or in_forward_mode()
        or wants_derivative(x, bias)
        or jit_tracing()
        or torch.is_autocast_enabled(x.device.type)
    )


@implements(OPERATIONS, aten.linear.default)
def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return linear(x, weight, bias) if isinstance(weight, FP8Weight) else NotImplemented


@implements(OPERATIONS, aten.mm.default)
def _mm(a: Any, b: Any) -> Any:
    if isinstance(b, FP8Weight):
        return linear(a, b.turned_around())
    return _left(a, b)


def _left(a: FP8Weight, b: torch.Tensor) -> Any:
    """``a [N, K] @ b [K, M]`` as ``(b.T @ a.T).T``."""
    y = linear(b.t(), a)
    return y if y is NotImplemented else y.t()


@implements(OPERATIONS, aten.mv.default)
def _mv(a: Any, x: Any) -> Any:
    return linear(x, a) if isinstance(a, FP8Weight) else NotImplemented


def _plus(bias: torch.Tensor, y: torch.Tensor, beta: float, alpha: float) -> torch.Tensor:
    y = y if alpha == 1 else alpha * y
    return y if beta == 0 else y + (bias if beta == 1 else beta * bias)


@implements(OPERATIONS, aten.bmm.default)
def _bmm(a: Any, b: Any) -> Any:
    if not isinstance(b, FP8Weight):
        y = _bmm(b.transpose(1, 2), a.turned_around())
        return y if y is NotImplemented else y.transpose(1, 2)
    if isinstance(a, FP8Weight) or a.dim() != 3 or a.shape[0] != b.shape[0] or b._home.precision == "original":
        return NotImplemented
    if b.stride(0) == 0 or b.size(0) == 1:  # one matrix for the whole batch
        shared = b.like((tuple(b.shape[1:]), b.stride()[1:], b.offset))
        y = linear(a.reshape(-1, a.size(2)), shared.turned_around())
        return y if y is NotImplemented else y.view(a.size(0), a.size(1), -1)
    batch, m, k = a.shape
    if isinstance(b._home, ChosenExperts) and (source := b._home.source) is not None:
        return _chosen_product(a, b, source, b._home.ids)
    if not m:
        return a.new_empty(batch, 0, b.shape[2])
    if len(b._home.layout.shape) == 2:
        return _one_by_one(a, b)
    ends = torch.arange(m, m * batch + 1, m, device=a.device, dtype=torch.int32)[:batch]
    y = grouped(a.reshape(-1, k), b, ends)
    return y if y is NotImplemented else y.view(batch, m, -1)


def _added(product: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """``beta * bias + alpha * product(a, b)``."""

    def add(bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
        y = NotImplemented if isinstance(bias, FP8Weight) else product(a, b)
        return y if y is NotImplemented else _plus(bias, y, beta, alpha)

    return add


_added_to_mm = _added(_mm)
_addmv = implements(OPERATIONS, aten.addmv.default)(_added(_mv))
_baddbmm = implements(OPERATIONS, aten.baddbmm.default)(_added(_bmm))


@implements(OPERATIONS, aten.addmm.default)
def _addmm(bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    fits = isinstance(b, FP8Weight) and not isinstance(bias, FP8Weight) and tuple(bias.shape) == (b.shape[1],)
    if fits and beta == 1 and alpha == 1 and bias.dtype == b.dtype:
        return linear(a, b.turned_around(), bias)
    return _added_to_mm(bias, a, b, beta=beta, alpha=alpha)


def _writes(product: Callable[..., Any]) -> Callable[..., Any]:
    """``product``, written to ``out``, or to its first operand if the operation is in place."""

    def write(*operands: Any, out: Any = None, **factors: Any) -> Any:
        target = operands[0] if out is None else out
        y = NotImplemented if isinstance(target, FP8Weight) else product(*operands, **factors)
        if y is NotImplemented or (y.dtype, y.device) != (target.dtype, target.device):
            return NotImplemented  # torch raises its own error
        if out is not None and not out.numel():
            out.resize_(y.shape)
        return target.copy_(y) if target.shape == y.shape else NotImplemented  # torch resizes with a warning, or raises

    return write


for _operations, _product in (
    ((aten.linear.out,), _linear),
    ((aten.mm.out,), _mm),
    ((aten.mv.out,), _mv),
    ((aten.bmm.out,), _bmm),
    ((aten.addmm.out, aten.addmm_.default), _addmm),
    ((aten.addmv.out, aten.addmv_.default), _addmv),
    ((aten.baddbmm.out, aten.baddbmm_.default), _baddbmm),
):
    implements(OPERATIONS, *_operations)(_writes(_product))


MOST_GROUPS = 32  # most groups of rows of one matrix that are multiplied one by one


def _one_by_one(a: torch.Tensor, b: FP8Weight) -> Any:
    """``y [G, M, N]``: ``a [G, M, K]`` times ``b [G, K, N]``, where ``b`` is row groups of one matrix."""
    if b.shape[0] > MOST_GROUPS:
        return NotImplemented
    products = []
    for group, x in enumerate(a):
        rows = b.like((tuple(b.shape[1:]), b.stride()[1:], b.offset + group * b.stride(0)))
        y = linear(x, rows.turned_around())
        if y is NotImplemented:
            return NotImplemented
        products.append(y)
    return torch.stack(products)


def _chosen_product(a: torch.Tensor, b: FP8Weight, source: Home, ids: torch.Tensor) -> Any:
    """``y [B, M, N]``: ``a [B, M, K]`` times expert ``ids[b]`` each, without copying the experts."""
    batch, m, k = a.shape
    part = b.part()
    if part is None or not part.whole(b._home.layout) or not part.flipped:
        return NotImplemented
    order = torch.argsort(ids, stable=True)
    experts = source.layout.shape[0]
    counts = torch.zeros(experts, device=a.device, dtype=torch.int32)
    counts = counts.index_add(0, ids, torch.ones_like(ids, dtype=torch.int32))
    ends = torch.cumsum(counts * m, dim=0, dtype=torch.int32)
    stack = FP8Weight(source, b.dtype)
    stack = stack if source.layout.turned else stack.turned_around()
    y = grouped(a[order].reshape(-1, k), stack, ends)
    if y is NotImplemented:
        return NotImplemented
    return torch.empty_like(y.view(batch, m, -1)).index_copy(0, order, y.view(batch, m, -1))


@implements(OPERATIONS, aten._grouped_mm.default, "transformers::grouped_mm_fallback")  # which compiled graphs have
def _grouped_mm(a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    if not isinstance(b, FP8Weight) or offs is None or bias is not None or out_dtype not in (None, a.dtype):
        return NotImplemented
    return grouped(a, b, offs)


def grouped(x: Any, weight: FP8Weight, ends: torch.Tensor) -> Any:
    """``y [T, N]``: rows of ``x [T, K]`` sorted by expert, times ``weight [E, K, N]``; ``ends [E]`` is one past the
    last row of each expert."""
    home, part = weight._home, weight.part()
    if isinstance(x, FP8Weight) or x.dim() != 2 or part is None or weight.dim() != 3 or not part.flipped:
        return NotImplemented
    if home.precision == "original":
        return NotImplemented
    if exporting_to_onnx():
        return NotImplemented  # which has no such product
    n, k = home.layout.matrix
    if part.rows != (0, n) or not part.all_columns(home.layout) or x.shape[1] != k:
        return NotImplemented
    if x.dtype != weight.dtype or x.device != weight.device or x.layout != torch.strided:
        return NotImplemented
    if x.is_meta:
        return x.new_empty(x.shape[0], n)
    form = home.form(x.dtype, x.device, part)
    if form is None:
        return NotImplemented
    run_dtype = form.dtype_for(x.dtype)
    rows, engine = x.to(run_dtype).contiguous(), ENGINES[form.engine]
    y = grouped_forward(rows, form, ends.to(torch.int32), run_dtype)
    if _runs(rows):
        home.activity.count(engine.kernel(rows.shape[0], form, run_dtype))
    return y.to(x.dtype)


@implements(FUNCTIONS, torch.einsum)
def _einsum(equation: Any, *operands: Any) -> Any:
    """An einsum such as ``einsum("ebk,enk->ebn", x, stack)``: batched by expert, with one dimension contracted."""
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    stacks = [place for place, operand in enumerate(operands) if isinstance(operand, FP8Weight)]
    if not isinstance(equation, str) or len(operands) != 2 or len(stacks) != 1:
        return NotImplemented
    stack, x = operands[stacks[0]], operands[1 - stacks[0]]
    if stack._home.precision == "original":
        return NotImplemented
    if not torch.compiler.is_compiling() and (folded := folded_operands(equation, stacks[0])) is not None:
        return _folded_product(x, stack, *folded)
    part = stack.part() if stack.dim() == 3 else None
    if part is None or torch.compiler.is_compiling():
        return NotImplemented
    plan = batched_operands(equation, stacks[0], stack_is_transposed=part.flipped)
    if plan is None:
        return NotImplemented
    tokens = plan.input(x, experts=stack.shape[0])
    return plan.output(torch.bmm(tokens, stack if part.flipped else stack.transpose(1, 2)))


def _folded_product(x: torch.Tensor, weight: FP8Weight, plan: FoldedEinsum, first: bool) -> Any:
    """An einsum with ``weight [N, ...]``, or with ``weight [K, ...]`` contracted over its first dimension."""
    w = matrix(weight)
    if w is None or x.dim() != len(plan.x_letters) or weight.dim() != len(plan.contracted + plan.made):
        return NotImplemented
    tokens = plan.input(x)
    if tokens.shape[-1] != w.shape[0 if first else 1]:
        return NotImplemented  # torch raises its own error
    y = F.linear(tokens, w.turned_around() if first else w)
    return plan.output(y, tuple(weight.shape[1:] if first else weight.shape[:1]))


def matrix(weight: FP8Weight) -> FP8Weight | None:
    """``weight [N, ...]`` viewed as ``[N, K]``, where K is all other dimensions; None if those are not contiguous."""
    step = 1
    for extent, stride in zip(reversed(weight.shape[1:]), reversed(weight.stride()[1:]), strict=True):
        if extent != 1 and stride != step:
            return None
        step *= extent
    return weight.like(((weight.shape[0], step), (weight.stride(0), 1), weight.offset))
