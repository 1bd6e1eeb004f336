"""Which tensors may be passed to C by address: plain ones whose memory holds their values, with no mode to notify."""

from __future__ import annotations

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Private functions, as these checks run at every call and the public ones take microseconds. They exist in torch 2.10
# to 2.15.
_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack


def plain(*tensors: torch.Tensor | None) -> bool:
    """Whether all of these are plain tensors, outside of every dispatch mode and functorch transform.

    Subclasses (DTensor, FakeTensor) and functorch wrappers have no memory, or another tensor's; so do sparse and nested
    tensors, those of another library's layout, and zero tensors. The memory of a negative view has the other sign.
    Under a mode (make_fx, FlopCounterMode) a product has to be an operation that the mode sees.
    """
    return not _modes() and plain_but_for_modes(*tensors)


def plain_but_for_modes(*tensors: torch.Tensor | None) -> bool:
    """``plain``, whether or not a dispatch mode is active."""
    if _transform() is not None:
        return False
    for tensor in tensors:  # noqa: SIM110 (a generator takes three times as long)
        if tensor is not None and not _holds(tensor):
            return False
    return True


def _holds(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory holds its values."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and not (tensor.is_neg() or tensor.is_nested or tensor._is_zerotensor())
    )
