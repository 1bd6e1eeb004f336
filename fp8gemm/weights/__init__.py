"""The FP8 weight: a parameter that multiplies by itself, whoever owns it."""

import torch

from . import convolution, copies, pickling, products, writes  # handlers register themselves
from .activity import Activity
from .convert import Change, convert, leave, made, put, revert
from .home import Home
from .linear import FP8Linear
from .persistence import own_weights
from .weight import FP8Weight

if torch.distributed.is_available():
    from . import bucket, collectives  # noqa: F401

__all__ = [
    "Activity",
    "Change",
    "FP8Linear",
    "FP8Weight",
    "Home",
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
