"""Functions that an FP8 weight answers without the dispatcher, or refuses."""

from __future__ import annotations

from typing import Any

import torch

from .. import native
from ..errors import UnsupportedError
from .dispatch import FUNCTIONS, implements
from .weight import FP8Weight


@implements(FUNCTIONS, torch.Tensor.detach)
def _detach(weight: FP8Weight) -> Any:
    """Past the dispatcher, for whose first operation on a subclass torch imports 40 MB of torch.distributed."""
    return weight.like() if native.plain() and not torch.compiler.is_compiling() else NotImplemented


@implements(FUNCTIONS, torch.Tensor.t, torch.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__)  # type: ignore[attr-defined]
def _transpose(weight: FP8Weight) -> Any:
    """Past the dispatcher too: what ``x @ weight.T`` asks for at every call."""
    if weight.dim() != 2 or torch.compiler.is_compiling() or not native.plain():
        return NotImplemented
    return weight.turned_around()


@implements(FUNCTIONS, torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _ask_for_gradient(weight: FP8Weight, requires_grad: bool = True) -> Any:
    if not requires_grad:
        return NotImplemented
    raise UnsupportedError(
        f"an FP8 weight of shape {tuple(weight.shape)} takes no gradient: train adapters beside it (LoRA), keep the "
        "layer dense by module_filter, or disable_fp8_gemm(model) first"
    )
