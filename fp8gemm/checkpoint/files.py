"""Safetensors files: a file, a folder or an index as one set of tensors; only headers are read."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..formats import DTYPES, Contents, TensorInfo, refuse_files
from ..formats.config import OWN_FILES, quantization_config
from .hub import Hub, fetch, is_id

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
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_SHARD = re.compile(r"^(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.safetensors$")
# File names that a config.json in the same folder describes.
_STANDARD = re.compile(r"^(model|diffusion_pytorch_model|consolidated)([.-].*)?\.safetensors$")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a checkpoint is: its files, the index from keys to shards, and the folder with its configs."""

    path: Path
    files: tuple[Path, ...]
    index: Mapping[str, str] | None = None
    folder: Path | None = None

    def config(self, name: str) -> Mapping[str, Any] | None:
        """A JSON object stored next to the weights; None if there is no such file."""
        if self.folder is None or not (self.folder / name).is_file():
            return None
        return read_json(self.folder / name)


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
        flat = torch.frombuffer(memory, dtype=torch.uint8, offset=self._start[key], count=info.nbytes)
        # The format does not require tensors to be aligned to their dtype.
        aligned = flat if flat.data_ptr() % info.dtype.itemsize == 0 else flat.clone()
        return aligned.view(info.dtype).view(info.shape)

    def contents(self, *, raw: bool = False) -> Contents:
        """What formats get to know about the checkpoint."""
        config = self.source.config("config.json")
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
            name = described["dtype"]
            if name not in _DTYPES:
                known = f" ({DTYPES[name]})" if name in DTYPES else ""
                raise CheckpointError(f"{path}: {key} has dtype {name}{known}; supported are {', '.join(_DTYPES)}")
            self.file_of[key] = path.name
            self.infos[key] = TensorInfo(dtype=_DTYPES[name], shape=tuple(described["shape"]))
            self._start[key] = start + described["data_offsets"][0]

    def _check_index(self, index: Mapping[str, str]) -> None:
        for key, file in index.items():
            if key not in self.infos:
                raise CheckpointError(f"the index says that {key} is in {file}, which does not contain it")


def locate(source: str | os.PathLike[str], hub: Hub) -> Source:
    """The files of a path or of a repository on the Hub.

    Raises:
        CheckpointError: there is no checkpoint, or more than one.
    """
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    if isinstance(source, str) and is_id(source):
        return _folder(fetch(source, hub))
    raise CheckpointError(f"{source} is neither a file, a folder nor an id on the Hub (owner/name)")


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of one safetensors file, validated by the library, and the offset at which its tensors begin.

    Raises:
        CheckpointError: it cannot be read, is a pickle, is truncated or is not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            start, brace = file.read(8), file.read(1)
            # The length of a header may begin with the same bytes as a pickle, but then its JSON follows.
            if path.suffix in _PICKLES or (start.startswith(_PICKLE_STARTS) and brace != b"{"):
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
    """Raises SafetensorError unless the library accepts the header and the size of the file."""
    try:
        safe_open(path, framework="pt")
    except RuntimeError as error:
        # It validates first and then has torch reserve memory for the whole file, which is not needed here.
        if os.strerror(errno.ENOMEM) not in str(error):
            raise


def _map(path: Path) -> mmap.mmap:
    """Maps the file into memory: pages are read on first access, and writes go to a private copy."""
    with path.open("rb") as file:
        if sys.platform == "win32":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        # Linux would count a whole writable mapping as used memory, and refuse files larger than what is free.
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=protection)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it cannot be read, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def _file(path: Path) -> Source:
    if path.name.endswith(".safetensors.index.json"):
        return _indexed(path)
    refuse_files([path.name])
    return Source(path=path, files=(path,), folder=path.parent if _STANDARD.match(path.name) else None)


def _folder(path: Path) -> Source:
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    refuse_files(names)
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    if indexes:
        return _indexed(path / _only(path, _preferred(indexes)))
    files = [name for name in names if name.endswith(".safetensors")]
    if not files:
        raise CheckpointError(_nothing(path, names))
    standard = [name for name in files if _STANDARD.match(name)] or files
    shards = {match["stem"]: int(match["count"]) for name in standard if (match := _SHARD.match(name))}
    if len(shards) == 1:
        stem, count = shards.popitem()
        found = [name for name in standard if (match := _SHARD.match(name)) and match["stem"] == stem]
        if len(found) != count:
            raise CheckpointError(f"{path} has {len(found)} of {count} shards and no index: {', '.join(found)}")
        return Source(path=path, files=tuple(path / name for name in found), folder=path)
    chosen = path / _only(path, _preferred(standard))
    return Source(path=path, files=(chosen,), folder=path)


def _preferred(names: list[str]) -> list[str]:
    """Hugging Face's names before Mistral's: repositories with both hold the same weights twice."""
    for start in ("model.", "diffusion_pytorch_model.", "consolidated."):
        if found := [name for name in names if name.startswith(start)]:
            whole = [name for name in found if name in (f"{start}safetensors", f"{start}safetensors.index.json")]
            return whole or found
    return names


def _only(path: Path, names: list[str]) -> str:
    if len(names) > 1:
        raise CheckpointError(f"{path} holds several checkpoints: {', '.join(names)}; pass the path of one of them")
    return names[0]


def _nothing(path: Path, names: list[str]) -> str:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{path} holds only pickles ({', '.join(pickles)}), which can run arbitrary code when opened; only "
            "safetensors files are read"
        )
    return f"{path} holds no .safetensors file; found {', '.join(names[:8]) or 'nothing'}"


def _indexed(path: Path) -> Source:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path} has no weight_map")
    names = sorted({str(name) for name in index.values()})
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{path} lists {len(names)} shards, {len(missing)} of them missing: {', '.join(missing)}")
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{path} lists shards outside its folder: {', '.join(outside)}")
    return Source(path=path, files=tuple(path.parent / name for name in names), index=index, folder=path.parent)


def readable_size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
