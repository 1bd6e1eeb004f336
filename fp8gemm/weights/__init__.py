"""``FP8Weight``: a parameter stored in FP8 that computes its own products, whichever module owns it."""

import torch

from . import blanks, convolution, copies, pickling, products, writes  # importing them registers their handlers
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
    "blanks",
    "convert",
    "convolution",
    "copies",
    "leave",
    "made",
    "own_weights",
    "pickling",
    "products",
    "put",
    "revert",
    "writes",
]
