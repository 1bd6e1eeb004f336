"""How many bytes an FP8 weight takes."""

from __future__ import annotations

import torch
from torch import nn

from ..scaled import Scheme
from .geometry import Layout
from .stored import Stored


class Sizes:
    """The part of a ``Home`` that counts bytes."""

    layout: Layout
    scheme: Scheme
    stored: Stored | None
    aside: Stored | None
    dense: torch.Tensor | None

    @property
    def original(self) -> nn.Parameter | None:
        """The dense parameter that was converted, if it is kept."""
        raise NotImplementedError

    def dense_is_original(self) -> bool:
        """Whether the values that wait to be quantized are the original's own memory."""
        dense, original = self.dense, self.original
        return original is not None and dense is not None and dense.data_ptr() == original.data_ptr()

    @property
    def fp8_nbytes(self) -> int:
        """Bytes of the FP8 weight and its scales; 0 before they exist."""
        if self.stored is None:
            return 0
        return self.scheme.nbytes(self.layout.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything held: FP8 data, scales, pending writes and a kept original."""
        dense, original = self.dense, self.original
        waiting = 0 if dense is None or self.dense_is_original() else dense.nbytes
        held = 0 if original is None else original.nbytes
        return self.fp8_nbytes + waiting + held + (0 if self.aside is None else self.aside.nbytes_beside(self.stored))
