"""Giving an FP8 weight another activation scheme; its bytes and scales stay as they are, bit for bit."""

from __future__ import annotations

import torch

from ..scaled import Scheme
from .home import Home
from .stored import Stored, lock


def set_activation(home: Home, scheme: Scheme, input_scale: torch.Tensor | None) -> None:
    """Multiplies activations under ``scheme``, with a static scale (float32 scalar) if it has one, from now on.

    ``scheme`` differs from ``home.scheme`` in its activations only.
    """
    with lock():
        stored = home.settle()
        assert stored is not None
        home.scheme = scheme
        home.input_scale = None if input_scale is None else input_scale.to(home.device, torch.float32)
        home._publish(Stored(stored.scaled()))
