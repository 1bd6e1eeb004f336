"""Writes safetensors: shards are planned first, filled one tensor at a time, and renamed when complete."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError
from ..formats import TensorInfo
from ..progress import byte_progress
from .files import DTYPE_NAMES

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_OURS = re.compile(r"^model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?$")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tensors that are made and stored together: their dtypes and shapes, and the function that makes them."""

    tensors: Mapping[str, TensorInfo]
    make: Callable[[], Mapping[str, torch.Tensor]]

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

    All are written under temporary names and renamed at the end. Shards of an earlier save that are not overwritten
    are deleted from the directory.

    Raises:
        CheckpointError: writing failed; the directory is unchanged, and temporary files have been removed.
    """
    folder = Path(directory)
    shards = _shards(list(pieces), parse_size(max_shard_size))
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    texts: dict[str, str] = {}
    total = sum(piece.nbytes for shard in shards for piece in shard)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for p in shard for key in p.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        texts["model.safetensors.index.json"] = json.dumps(index, indent=2) + "\n"
    if config is not None:
        texts["config.json"] = json.dumps(config, indent=2) + "\n"
    temporary: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with byte_progress(total, what=what) as counter:
            for name, shard in zip(names, shards, strict=True):
                path = temporary[folder / name] = folder / f".{name}.{os.getpid()}.tmp"
                _write_shard(path, shard, counter.update)
        for name, text in texts.items():
            path = temporary[folder / name] = folder / f".{name}.{os.getpid()}.tmp"
            path.write_text(text, encoding="utf-8")
        for final, path in temporary.items():
            os.replace(path, final)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder}: {error.strerror or error}; nothing incomplete was left there"
        ) from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    _remove_stale(folder, set(temporary))
    return list(temporary)


def _remove_stale(folder: Path, written: set[Path]) -> None:
    for path in folder.iterdir():
        if _OURS.match(path.name) and path not in written:
            path.unlink()


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


def _write_shard(path: Path, pieces: list[Piece], count: Callable[[float], object]) -> None:
    infos = {key: info for piece in pieces for key, info in piece.tensors.items()}
    header, offsets = _header(infos)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(info.nbytes for info in infos.values()))
        for piece in pieces:
            made = piece.make()
            for key, info in piece.tensors.items():
                _write_tensor(file, len(header) + offsets[key], key, made[key], info)
            count(piece.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _header(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, including its length, and each tensor's offset after it.

    Wider dtypes come first, as in the reference writer, so that every tensor is aligned to its own dtype.
    """
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
