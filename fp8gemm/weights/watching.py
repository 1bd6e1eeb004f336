"""Who sees a product as an operation: tracers, the profiler, dispatch modes; C sees plain memory only."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .. import native
from ..errors import UnsupportedError

profiling: Callable[[], bool] = torch._C._autograd._profiler_enabled


def watched(*tensors: torch.Tensor | None) -> bool:
    """Whether a product has to be an operation: it is traced, counted or profiled, or C cannot read these tensors."""
    return jit_tracing() or profiling() or not native.plain(*tensors)


def counted(x: torch.Tensor) -> bool:
    """Whether the only thing that watches a product of ``x`` is a mode that says of itself ``counts_operations``.

    Such a mode needs no more than the registered operation below autograd. Autograd then records what it records
    without the mode, so that a checkpoint of the pass can be recomputed in backward, when the mode is gone.
    """
    mode = _get_current_dispatch_mode() if torch._C._len_torch_dispatch_stack() == 1 else None
    return getattr(mode, "counts_operations", False) and native.plain_but_for_modes(x)


def exporting() -> bool:
    """The flag behind ``torch.compiler.is_exporting()``, which torch 2.10's Dynamo assumes to be true in every
    trace."""
    return torch.compiler._is_exporting_flag


def exporting_to_onnx() -> bool:
    """Whether ``torch.onnx.export`` is tracing the model."""
    return torch.onnx.is_in_onnx_export()


def jit_tracing() -> bool:
    """Whether torch.jit.trace is recording; it treats everything except torch operations as constants."""
    return torch._C._get_tracing_state() is not None


def warn_of_traces() -> None:
    """Says what torch.jit.trace cannot do with FP8 weights, while it is recording.

    Raises:
        UnsupportedError: it records for torch.onnx, which has no operator for what it would find.
    """
    if jit_tracing():
        if exporting_to_onnx():
            raise UnsupportedError(
                "torch.onnx.export(dynamo=False) cannot write FP8 weights: use dynamo=True, or call "
                "fp8gemm.disable_fp8_gemm(model) first"
            )
        warnings.warn(
            "torch.jit.trace records products with FP8 weights without gradients, and torch.jit.save crashes on what "
            "it makes: use torch.export, or call fp8gemm.disable_fp8_gemm(model) first",
            torch.jit._trace.TracerWarning,
            stacklevel=2,
        )
