"""Bound products: from the second call with a shape on, all decisions are reused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..engines import ENGINES, PackedWeight
from .activity import Activity
from .watching import watched

CALLS = "_fp8gemm_calls"  # attribute of a weight's bytes: its bound calls, each with the name of its kernel
ACTIVITY = "_fp8gemm_activity"  # attribute of a weight's bytes: the counters of whoever gave them to a graph
MOST_CALLS = 32  # the most bound calls of a weight; one more clears them
ALIGNMENT = 16  # bytes, of inputs: the alignment that compiled kernels were specialized for


def remembered_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """``Engine.linear``; from the second call with this shape of ``x`` on, by a bound call.

    Bound calls are stored with the bytes that they are for, by the addresses of all their tensors except ``x``.
    """
    data = weight.data
    if type(data) is not torch.Tensor or not _aligned(x) or not x.numel():
        return ENGINES[weight.engine].linear(x, weight, bias, out_dtype)
    others = (bias, weight.input_scale)
    key = call_key(x, out_dtype, weight.engine, weight.accumulate, data, weight.scale, *others)
    calls: dict[Any, Any] = data.__dict__.setdefault(CALLS, {})
    call = calls.get(key)
    if call:
        y: torch.Tensor = call[0](x)
        return y
    engine = ENGINES[weight.engine]
    if call is None:
        if len(calls) >= MOST_CALLS:
            calls.clear()
        # Bind at the second call, as a first one may remain the only one; False if the engine has nothing to bind.
        if key not in calls:
            calls[key] = None
        else:
            compute = engine.bind(x, weight, bias, out_dtype)
            calls[key] = compute is not None and (compute, engine.kernel(x.shape[0], weight, out_dtype))
    return engine.linear(x, weight, bias, out_dtype)


def count_for(activity: Activity, data: torch.Tensor) -> None:
    """Lets calls of compiled graphs that receive these bytes be counted: copies that still share them have one
    counter, that of the copy which was compiled last."""
    data.__dict__[ACTIVITY] = activity


def forget_bound(data: torch.Tensor) -> None:
    """Drops the calls that were bound for these bytes, and what they hold."""
    data.__dict__.pop(CALLS, None)


def call_key(
    x: torch.Tensor,
    out_dtype: torch.dtype,
    engine: str,
    accumulate: str,
    data: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
) -> tuple[Any, ...]:
    """The key of a bound call among those of one weight's bytes."""
    input_scale_at = 0 if input_scale is None else input_scale.data_ptr()
    ours = (data.data_ptr(), scale.data_ptr(), bias_key(bias), input_scale_at)
    return (x.shape, x.dtype, out_dtype, engine, accumulate, *ours)


def bias_key(bias: torch.Tensor | None) -> tuple[int, torch.dtype] | None:
    """What a bound call depends on of its bias, whose values may change."""
    return None if bias is None else (bias.data_ptr(), bias.dtype)


def _aligned(x: torch.Tensor) -> bool:
    return x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0


@dataclass(frozen=True)
class Call:
    """A bound call of a weight, or of rows of it.

    It holds the tensors whose memory ``compute`` reads, which another thread may let go of in the middle of a call.
    """

    compute: Callable[[torch.Tensor], torch.Tensor]
    weight: PackedWeight
    kernel: str
    bias: torch.Tensor | None

    def fits(self, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether ``x`` is as it was, beyond the key, and nothing has to see an operation."""
        return x.device == self.weight.device and _aligned(x) and not watched(x, bias)


def remember(
    calls: dict[Any, Any],
    key: Any,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    kernel: str,
) -> None:
    """Binds the call of this key when it comes for the second time; ``calls`` belong to one version of a weight.

    The value of a key is None after the first call, and False if the engine cannot bind it.
    """
    if key not in calls:
        if len(calls) >= MOST_CALLS:
            calls.clear()
        calls[key] = None
        return
    if calls[key] is not None:
        return
    if (
        not _aligned(x)
        or not x.numel()
        or watched(x, weight.data, weight.scale, bias)
        or (bias is not None and bias.device != x.device)
    ):
        return
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    held = None if bias is None else bias.detach()
    with torch.no_grad():
        compute = ENGINES[weight.engine].bind(x, weight, held, x.dtype)
    calls[key] = compute is not None and Call(compute, weight, kernel, held)
