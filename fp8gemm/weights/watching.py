"""Who sees a product as an operation: tracers, the profiler, dispatch modes; C sees plain memory only."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import native

profiling: Callable[[], bool] = torch._C._autograd._profiler_enabled


def watched(*tensors: torch.Tensor | None) -> bool:
    """Whether a product has to be an operation: it is traced, counted or profiled, or C cannot read these tensors."""
    return jit_tracing() or profiling() or not native.plain(*tensors)


def exporting() -> bool:
    """The flag behind ``torch.compiler.is_exporting()``, which torch 2.10's Dynamo assumes to be true in every
    trace."""
    return torch.compiler._is_exporting_flag


def jit_tracing() -> bool:
    """Whether torch.jit.trace is recording; it treats everything except torch operations as constants."""
    return torch._C._get_tracing_state() is not None
