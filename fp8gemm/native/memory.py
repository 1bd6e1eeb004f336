"""Which tensors may be handed to C by address: those with memory of their own that nobody has to see used."""

from __future__ import annotations

import torch

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None)})
# Private, and asked at every call: the public ways cost microseconds. Both are there from torch 2.10 to 2.15.
_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack


def unseen() -> bool:
    """Whether no dispatch mode (make_fx, FakeTensorMode, FlopCounterMode) and no functorch transform is active."""
    return not _modes() and _transform() is None


def plain(*tensors: torch.Tensor | None) -> bool:
    """Whether all of these are plain tensors outside of every mode and transform.

    A subclass (DTensor, FakeTensor) or a functorch wrapper has no memory, or another's; a product under a mode has to
    be an operation that the mode sees.
    """
    return unseen() and all(type(tensor) in _PLAIN for tensor in tensors)
