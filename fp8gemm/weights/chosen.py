"""Experts gathered from a stack by index, one per token; their bytes are copied only when somebody reads them."""

from __future__ import annotations

from typing import Any

import torch

from ..scaled import ScaledTensor
from .geometry import Layout
from .home import Home
from .stored import Stored


class ChosenExperts(Home):
    """The home of ``stack[ids]``, which transformers' ``batched_mm`` experts use for one product.

    ``source`` is the stack's home as long as nothing was copied. Later writes to the stack or to the indices do not
    change the gathered experts. ``ids [B]`` are not negative.
    """

    inner_ids: torch.Tensor  # for tracers, as the other tensors of a home

    def __init__(self, source: Home, ids: torch.Tensor) -> None:
        layout = Layout((ids.shape[0], *source.layout.shape[1:]), source.layout.turned)
        self._source: Home | None = source
        self._then = source.settle()
        self.ids = ids.to(source.device)
        self._seen = source.version
        self._stored: Stored | None = None
        super().__init__(source.options, layout, scheme=source.scheme)
        self.activity, self.precision = source.activity, source.precision

    @property
    def source(self) -> Home | None:
        """The stack's home, as long as neither the stack nor this copy was written to."""
        if self._stored is None and self._source is not None and self._source.version == self._seen:
            return self._source
        return None

    @property
    def stored(self) -> Stored | None:
        if self._stored is None and self._then is not None:
            weight = self._then.scaled()
            data = weight.data.view(torch.uint8).index_select(0, self.ids).view(weight.data.dtype)
            scale = weight.scale.index_select(0, self.ids)
            self._stored = Stored(ScaledTensor(data, scale, weight.granularity))
            self._source = self._then = None
        return self._stored

    @stored.setter
    def stored(self, value: Any) -> None:
        if value is not None:
            self._stored, self._source, self._then = value, None, None

    @property
    def device(self) -> torch.device:
        return self.ids.device
