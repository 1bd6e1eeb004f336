"""Safetensors files: a file, a folder or an index as one set of tensors; only headers are read."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..formats import DTYPES, Contents, TensorInfo
from ..formats.config import OWN_FILES, quantization_config
from .locate import CONFIG, PICKLES, Source, check_quantization, check_regular

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# Names of tensors are matched with regexes, some of which take quadratic time; published ones have up to 150 letters.
_LONGEST_NAME = 1000
# Sizes that torch can express.
_MOST_DIMENSIONS, _LARGEST_SIZE = 64, 2**63


class Tensors:
    """The tensors of a source by key. ``read`` gives views of the memory-mapped files."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.metadata: dict[str, str] = {}
        self.infos: dict[str, TensorInfo] = {}
        self.file_of: dict[str, str] = {}
        self._memory: dict[str, mmap.mmap] = {}
        self._start: dict[str, int] = {}
        for path in source.files:
            self._open(path)
        if source.index is not None:
            self._check_index(source.index)

    def read(self, key: str) -> torch.Tensor:
        info, memory = self.infos[key], self._memory[self.file_of[key]]
        if info.numel == 0:
            return torch.empty(info.shape, dtype=info.dtype, device="cpu")
        if memory.size() < len(memory):
            file = self.file_of[key]
            raise CheckpointError(f"{file} had {len(memory)} bytes when it was opened, and has {memory.size()} now")
        flat = torch.frombuffer(memory, dtype=torch.uint8, offset=self._start[key], count=info.nbytes)
        # The format does not require tensors to be aligned to their dtype.
        aligned = flat if flat.data_ptr() % info.dtype.itemsize == 0 else flat.clone()
        return aligned.view(info.dtype).view(info.shape)

    def contents(self, *, raw: bool = False) -> Contents:
        """What formats get to know about the checkpoint."""
        config = self.source.config(CONFIG)
        check_quantization(config or {}, self.source.path)
        own = next((found for name in OWN_FILES if (found := self.source.config(name)) is not None), None)
        return Contents(
            tensors=self.infos,
            metadata=self.metadata,
            config=quantization_config(config, own, self.metadata),
            model_config=config,
            files=tuple(path.name for path in self.source.files),
            read=self.read,
            raw=raw,
        )

    @cached_property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def _open(self, path: Path) -> None:
        header, start = read_header(path)
        self.metadata.update(header.pop("__metadata__", {}))
        self._memory[path.name] = _map(path)
        # In file order, so that reading all tensors reads the file sequentially.
        for key, described in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            if key in self.file_of:
                raise CheckpointError(f"{key} is in two files, {self.file_of[key]} and {path.name}")
            name, shape = described["dtype"], tuple(described["shape"])
            if len(key) > _LONGEST_NAME:
                raise CheckpointError(f"{path}: a name of {len(key)} letters, {key[:60]}...; at most {_LONGEST_NAME}")
            if name not in _DTYPES:
                known = f" ({DTYPES[name]})" if name in DTYPES else ""
                raise CheckpointError(f"{path}: {key} has dtype {name}{known}; supported are {', '.join(_DTYPES)}")
            if len(shape) > _MOST_DIMENSIONS or math.prod(max(size, 1) for size in shape) >= _LARGEST_SIZE:
                raise CheckpointError(f"{path}: {key} has {len(shape)} dimensions of sizes that no tensor can have")
            self.file_of[key] = path.name
            self.infos[key] = TensorInfo(dtype=_DTYPES[name], shape=shape)
            self._start[key] = start + described["data_offsets"][0]

    def _check_index(self, index: Mapping[str, str]) -> None:
        for key, file in index.items():
            if (found := self.file_of.get(key)) != file:
                where = f": it is in {found}" if found else ""
                raise CheckpointError(f"the index says that {key} is in {file}, which does not contain it{where}")


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of one safetensors file, validated by the library, and the offset at which its tensors begin.

    Raises:
        CheckpointError: it cannot be read, is a pickle, is truncated or is not a safetensors file.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            start, brace = file.read(8), file.read(1)
            # The length of a header may begin with the same bytes as a pickle, but then its JSON follows.
            if path.suffix in PICKLES or (start.startswith(_PICKLE_STARTS) and brace != b"{"):
                raise CheckpointError(
                    f"{path} is a pickle, which can run arbitrary code when opened; only safetensors files are read. "
                    "If you trust it, convert it with safetensors.torch.save_file"
                )
            _check(path)
            size = int.from_bytes(start, "little")
            header: dict[str, Any] = json.loads(brace + file.read(size - 1))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a complete safetensors file: {error}; if it was downloaded "
            "or copied, try that again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return header, 8 + size


def _check(path: Path) -> None:
    """Raises SafetensorError or CheckpointError unless the library accepts the header and the size of the file."""
    try:
        safe_open(path, framework="pt")
    except RuntimeError as error:
        # It validates first and then has torch reserve memory for the whole file, which is not needed here, and which
        # torch refuses if the file has been replaced by a smaller one in between.
        if os.strerror(errno.ENOMEM) not in str(error):
            raise CheckpointError(f"cannot map {path} into memory: {error}") from error


def _map(path: Path) -> mmap.mmap:
    """Maps the file into memory: pages are read on first access, and writes go to a private copy."""
    try:
        with path.open("rb") as file:
            if sys.platform == "win32":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            # Linux would count a whole writable mapping as used memory, and refuse files larger than what is free.
            no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=protection)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def readable_size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
