"""The table of checkpoint formats: one file per family, one row per format."""

from __future__ import annotations

from ..errors import CheckpointError, UnsupportedError
from .auto_round import AutoRound
from .base import Contents, Format, Layer, Layout, Read, TensorInfo, Written
from .codes import is_codes
from .comfy import Comfy
from .compressed_tensors import CompressedTensors
from .experts import Stack, coarsened, join_rows, slice_rows, stacks
from .fine_grained import Fbgemm, FineGrained, Plain
from .modelopt import ModelOpt
from .quanto import Quanto
from .refused import DTYPES, REFUSED, Refusal, refuse, refuse_files
from .scan import scan
from .sdnq import SDNQ
from .tensorrt import TensorRT
from .torchao import TorchAO


class Unquantized(Format):
    """A checkpoint without FP8."""

    name = "unquantized"

    def recognises(self, contents: Contents) -> str:
        return "" if contents.holds_fp8 else "no tensor is FP8"

    def check(self, contents: Contents, layout: Layout) -> None:
        if contents.method:
            layout.suspicious.append(f"the config says quant_method {contents.method}, but no tensor is FP8")


# The first that recognizes a checkpoint reads it: formats identified by config come before those by tensor names.
FORMATS: list[Format] = [
    CompressedTensors(),
    ModelOpt(),
    TorchAO(),
    SDNQ(),
    AutoRound(),
    Quanto(),
    Fbgemm(),
    FineGrained(),
    TensorRT(),
    Comfy(),
    Plain(),
    Unquantized(),
]
_OWN = tuple(FORMATS)


def register_format(format: Format) -> Format:
    """Adds a custom checkpoint format, which is tried before all others; ``examples/own_format.py`` shows one.

    Returns:
        ``format`` itself.

    Raises:
        ValueError: the name is empty or taken.

    Example:
        >>> class Mine(Format):
        ...     name = "mine"
        ...     def recognises(self, contents):
        ...         return "a file of mine" if "mine" in contents.metadata else ""
        >>> register_format(Mine()).name
        'mine'
        >>> FORMATS.pop(0).name
        'mine'
    """
    known = [other.name for other in FORMATS]
    if not format.name or format.name in known:
        raise ValueError(f"a format needs a name that is not taken, found {format.name!r}; taken: {', '.join(known)}")
    FORMATS.insert(0, format)
    return format


def detect(contents: Contents) -> tuple[Format, str]:
    """The format of a checkpoint, and how it was recognized.

    Raises:
        CheckpointError: there are FP8 tensors, but no format recognizes them; or the layout is one of ``REFUSED``.
    """
    for format in FORMATS:
        if format is _OWN[0]:
            refuse(contents)
        if reason := format.recognises(contents):
            return format, reason
    key = next(key for key, info in contents.tensors.items() if str(info.dtype).startswith("torch.float8"))
    raise CheckpointError(
        f"{key} is FP8 but has no scale, and neither the config nor the tensor names identify its format; if this is a "
        "raw cast, whose bytes are the values, open_checkpoint(..., raw=True) reads it. Formats that can be read: "
        f"{', '.join(format.name for format in FORMATS)}"
    )


def writer(name: str) -> Format:
    """The writable format called ``name``.

    Raises:
        UnsupportedError: there is none; the message lists the writable formats.
    """
    names = [format.name for format in FORMATS if format.writable]
    for format in FORMATS:
        if format.name == name and format.writable:
            return format
    known = f"{', '.join(names[:-1])} or {names[-1]}"
    raise UnsupportedError(f"checkpoints can be written as {known}, found {name!r}")


__all__ = [
    "DTYPES",
    "FORMATS",
    "REFUSED",
    "Contents",
    "Format",
    "Layer",
    "Layout",
    "Read",
    "Refusal",
    "Stack",
    "TensorInfo",
    "Written",
    "coarsened",
    "detect",
    "is_codes",
    "join_rows",
    "refuse_files",
    "register_format",
    "scan",
    "slice_rows",
    "stacks",
    "writer",
]
