"""What a collective sends of an FP8 weight: its bytes with their scales, or its values."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch

from ..numerics import dequantize
from ..scaled import ScaledTensor
from .copies import write_part
from .geometry import Part, swapped
from .packed import quantized
from .sharding import whole_scheme
from .stored import lock
from .weight import FP8Weight


def begins_a_block(weight: FP8Weight) -> bool:
    """Whether a view is a rectangle that starts at a block boundary, so that its first scale covers nothing before
    it."""
    part, grid = weight.part(), weight._home.scheme.weight
    return part is not None and not part.rows[0] % (grid.rows or 1) and not part.cols[0] % (grid.cols or 1)


class Message:
    """The bytes of a block-aligned part of a weight, followed by its scales, in one uint8 tensor."""

    def __init__(self, weight: FP8Weight, part: Part) -> None:
        self.weight, self.part = weight, part
        self.shape = swapped(weight.shape, part.flipped)
        self.grid, self.fp8 = weight._home.scheme.weight, weight._home.options.weight_dtype
        self.scales = self.grid.scale_shape(self.shape)
        self.size = math.prod(self.shape)

    @staticmethod
    def of(tensor: Any) -> Message | None:
        """The message of a weight; None if ``tensor`` is not one, is not block-aligned, or keeps its original.

        The answer is the same on all ranks that hold the same part of the same weight.
        """
        if not isinstance(tensor, FP8Weight) or tensor._home.options.fp16_weight_storage != "discard":
            return None
        home = tensor._home
        flat = tensor.dim() == 1 and tensor.is_contiguous() and tensor.numel() == math.prod(home.layout.shape)
        weight = FP8Weight(home, tensor.dtype) if flat else tensor
        part = weight.part()
        return Message(weight, part) if part is not None and begins_a_block(weight) else None

    @property
    def ready(self) -> bool:
        """Whether the bytes are up to date: the weight is quantized and is not a temporary copy that was written to."""
        home = self.weight._home
        return home.stored is not None and home.settle() is not None

    @property
    def facts(self) -> int:
        """A checksum of everything that ranks have to agree on."""
        home = self.weight._home
        return zlib.crc32(
            repr((self.shape, self.part.flipped, whole_scheme(home.scheme), self.grid, self.fp8)).encode()
        )

    def room(self, times: int = 1) -> torch.Tensor:
        size = times * (self.size + 4 * math.prod(self.scales))
        return torch.empty(size, dtype=torch.uint8, device=self.weight.device)

    def write(self) -> torch.Tensor:
        return torch.cat([t.contiguous().view(torch.uint8).view(-1) for t in self._tensors()])

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        home = self.weight._home
        stored = home.settle()
        if stored is None:
            w = self.weight.dequantize()
            w = w.transpose(-1, -2) if self.part.flipped else w
            scaled = quantized(w.contiguous(), home.options, home.scheme, w.device)
            return scaled.data, scaled.scale
        taken = self.part.take(stored.scaled())
        assert taken is not None
        return taken.data, taken.scale

    def read(self, buffer: torch.Tensor) -> ScaledTensor:
        data = buffer[: self.size].view(self.fp8).view(self.shape)
        scale = buffer[self.size :].clone().view(torch.float32).view(self.scales)
        return ScaledTensor(data, scale, self.grid)

    def deliver(self, buffer: torch.Tensor, target: torch.Tensor) -> None:
        """Gives ``target``, a weight or a dense tensor, the received bytes or their values."""
        scaled, own = self.read(buffer), Message.of(target)
        alike = own is not None and (own.shape, own.grid, own.fp8) == (self.shape, self.grid, self.fp8)
        if own is not None and alike and own.part.flipped == self.part.flipped and own.take(scaled):
            return
        w = dequantize(scaled, target.dtype)
        target.copy_((w.transpose(-1, -2) if self.part.flipped else w).reshape(target.shape))
        if isinstance(target, FP8Weight):
            target._home.owned = True

    def take(self, scaled: ScaledTensor) -> bool:
        """Overwrites the weight's bytes with received ones; False if their blocks do not fit."""
        home = self.weight._home
        if self.part.whole(home.layout):
            with lock():
                home.dense = None  # pending writes are overwritten
                home.take_bytes(scaled)
                home.owned = True
            return True
        stored = home.settle()
        if stored is None or self.part.take(stored.scaled(), to_write=True) is None:
            return False
        write_part(self.weight, scaled)
        home.owned = True
        return True


def values_to_send(weight: FP8Weight) -> torch.Tensor:
    """The dense values, of the original where it is kept, from which another rank quantizes the same bytes."""
    home = weight._home
    if home.original is None or home.dense is not None:
        return weight.dequantize().contiguous()
    view = home.original.detach().as_strided(weight.size(), weight.stride(), weight.offset)
    return view.to(weight.device, weight.dtype, copy=True).contiguous()
