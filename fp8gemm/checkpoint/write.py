"""Writes safetensors: shards are planned first, filled one tensor at a time, and take effect when all are complete."""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..formats import TensorInfo
from ..progress import byte_progress
from .files import DTYPE_NAMES
from .locate import WHOLE
from .switch import replacing

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tensors that are made and stored together: their dtypes and shapes, and the function that makes them.

    ``metadata`` is for the header of their file.
    """

    tensors: Mapping[str, TensorInfo]
    make: Callable[[], Mapping[str, torch.Tensor]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def parse_size(size: int | str) -> int:
    """``"5GB"`` in bytes; a GB is 10**9, a GiB 2**30.

    Raises:
        ValueError: it is not a positive number of bytes or a string with such a unit.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)\s*", size.upper())
        if match is None:
            raise ValueError(f"a size must be a number of bytes or a string such as '5GB' or '500MiB', found {size!r}")
        size = int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise ValueError(f"a shard must hold at least one byte, found {size}")
    return size


def write_checkpoint(
    directory: str | os.PathLike[str],
    pieces: Iterable[Piece],
    *,
    config: Mapping[str, Any] | None,
    max_shard_size: int | str,
    what: str,
) -> list[Path]:
    """Writes shards, their index and ``config.json``; returns the files, weights first.

    They replace a checkpoint that is there in one step, as ``switch`` describes: a save that is killed leaves the old
    one or the new one.

    Raises:
        CheckpointError: writing failed; unless the message says otherwise, the directory is unchanged.
    """
    shards = _shards(list(pieces), parse_size(max_shard_size))
    total = sum(piece.nbytes for shard in shards for piece in shard)
    with replacing(directory) as new:
        with byte_progress(total, what=what) as counter:
            files = [new.write(WHOLE, partial(fill, pieces=shard, count=counter.update)) for shard in shards]
        keys = [[key for piece in shard for key in piece.tensors] for shard in shards]
        return new.finish(files, keys, config, total)


def _shards(pieces: list[Piece], limit: int) -> list[list[Piece]]:
    """The pieces in order, as many per shard as fit; a piece larger than a shard gets its own."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return shards


def fill(file: BinaryIO, *, pieces: Sequence[Piece], count: Callable[[float], object]) -> None:
    """Writes a safetensors file with these tensors, one piece in memory at a time."""
    infos = {key: info for piece in pieces for key, info in piece.tensors.items()}
    header, offsets = _header(infos, {key: text for piece in pieces for key, text in piece.metadata.items()})
    file.write(header)
    file.truncate(len(header) + sum(info.nbytes for info in infos.values()))
    for piece in pieces:
        made = piece.make()
        for key, info in piece.tensors.items():
            _write_tensor(file, len(header) + offsets[key], key, made[key], info)
        count(piece.nbytes)


def _header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, including its length, and each tensor's offset after it.

    Wider dtypes come first, as in the reference writer, so that every tensor is aligned to its own dtype.
    """
    described: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offsets = {}
    end = 0
    for key in sorted(infos, key=lambda key: (-infos[key].dtype.itemsize, key)):
        info = infos[key]
        offsets[key], start, end = end, end, end + info.nbytes
        described[key] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _write_tensor(file: BinaryIO, offset: int, key: str, tensor: torch.Tensor, info: TensorInfo) -> None:
    if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
        raise ValueError(f"{key} was planned as {info.dtype} {info.shape}, found {tensor.dtype} {tuple(tensor.shape)}")
    if tensor.numel() == 0:
        return
    plain = tensor.detach().to("cpu").contiguous()
    file.seek(offset)
    # Straight from the tensor's memory: no copy, and no NumPy, which has no FP8 and may not be installed.
    file.write((ctypes.c_char * plain.nbytes).from_address(plain.data_ptr()))
