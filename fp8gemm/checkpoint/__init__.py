"""Checkpoints: read, load, save, convert and quantize them."""

from __future__ import annotations

from .load import LoadReport, load_checkpoint
from .original import original_key_mapping
from .pretrained import give_saving_back, redirect_saving
from .read import Checkpoint, open_checkpoint
from .renaming import Split, Swap
from .rewrite import convert_checkpoint, quantize_checkpoint
from .save import save_checkpoint
from .write_report import WriteReport

__all__ = [
    "Checkpoint",
    "LoadReport",
    "Split",
    "Swap",
    "WriteReport",
    "convert_checkpoint",
    "give_saving_back",
    "load_checkpoint",
    "open_checkpoint",
    "original_key_mapping",
    "quantize_checkpoint",
    "redirect_saving",
    "save_checkpoint",
]
