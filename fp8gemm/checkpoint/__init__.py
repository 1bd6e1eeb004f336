"""Checkpoints: shards <-> scaled tensors <-> modules."""

from __future__ import annotations

from .convert import WriteReport, convert_checkpoint
from .load import LoadReport, load_checkpoint
from .pretrained import give_saving_back, redirect_saving
from .quantized import quantize_checkpoint
from .read import Checkpoint, open_checkpoint
from .save import save_checkpoint

__all__ = [
    "Checkpoint",
    "LoadReport",
    "WriteReport",
    "convert_checkpoint",
    "give_saving_back",
    "load_checkpoint",
    "open_checkpoint",
    "quantize_checkpoint",
    "redirect_saving",
    "save_checkpoint",
]
