"""``FP8Weight``: a parameter stored in FP8 that computes its own products, whichever module owns it."""

import torch

# importing them registers their handlers
from . import attention, blanks, convolution, copies, gathers, pickling, products, writes
from .activity import Activity
from .convert import Change, convert, leave, made, put, revert
from .home import Home
from .linear import FP8Linear
from .persistence import own_weights
from .weight import FP8Weight

if torch.distributed.is_available():
    from . import bucket, collectives, splits  # noqa: F401

__all__ = [
    "Activity",
    "Change",
    "FP8Linear",
    "FP8Weight",
    "Home",
    "attention",
    "blanks",
    "convert",
    "convolution",
    "copies",
    "gathers",
    "leave",
    "made",
    "own_weights",
    "pickling",
    "products",
    "put",
    "revert",
    "writes",
]
