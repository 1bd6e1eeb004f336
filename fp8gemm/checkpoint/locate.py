"""Which files make up a checkpoint: a path, a folder, an index or a repository; and their configs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..formats import refuse_files
from .hub import Hub, fetch, is_id

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
# The key of config.json with which transformers, and this package, are told which file holds the weights.
WEIGHTS = "transformers_weights"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHARD = re.compile(r"^(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.safetensors$")
# Hugging Face's names before Mistral's: repositories with both hold the same weights twice.
_STEMS = ("model", "diffusion_pytorch_model", "consolidated")
# File names that a config.json in the same folder describes.
_STANDARD = re.compile(rf"^({'|'.join(_STEMS)})([.-].*)?\.safetensors$")
# The longest published index has 20 MB.
_LARGEST_JSON = 1 << 27


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a checkpoint is: its files, the index from keys to shards, and the folder with its configs."""

    path: Path
    files: tuple[Path, ...]
    index: Mapping[str, str] | None = None
    folder: Path | None = None

    def config(self, name: str) -> Mapping[str, Any] | None:
        """A JSON object stored next to the weights; None if there is no such file."""
        return None if self.folder is None else config_in(self.folder, name)


def locate(source: str | os.PathLike[str], hub: Hub) -> Source:
    """The files of a path or of a repository on the Hub.

    Raises:
        CheckpointError: there is no checkpoint, or more than one.
    """
    path = Path(source)
    if os.path.isdir(path):
        return _folder(path)
    if os.path.exists(path):
        return _file(path)
    if isinstance(source, str) and is_id(source):
        return _folder(fetch(source, hub))
    raise CheckpointError(f"{source} is neither a file, a folder nor an id on the Hub (owner/name)")


def stamp(source: str | os.PathLike[str]) -> list[tuple[int, ...]]:
    """What changes whenever a save into the folder ``source``, or into that of the file, takes another step."""
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    found: list[tuple[int, ...]] = []
    for name in (CONFIG, WHOLE, INDEX):
        try:
            status = os.stat(os.path.join(folder, name))
        except OSError:
            found.append(())
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return found


def config_in(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON object in ``folder``; None if there is no such file."""
    return read_json(folder / name) if (folder / name).exists() else None


def check_quantization(config: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError for a description of quantization that is no object, and so would be passed over."""
    for holder in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for name in ("quantization_config", "compression_config"):
            if not isinstance(found := holder.get(name) or {}, Mapping):
                raise CheckpointError(f"{CONFIG} of {path}: {name} must be an object, found {found!r:.60}")


def check_regular(path: Path) -> None:
    """Raises CheckpointError for what is no file of bytes: opening a pipe would wait, a device may never end."""
    if not path.is_file():
        raise CheckpointError(f"{path} is {'a folder' if path.is_dir() else 'a pipe or a device'}, not a file")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it cannot be read, or is not a JSON object.
    """
    try:
        check_regular(path)
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise CheckpointError(f"{path} has {size} bytes; a JSON file may have {_LARGEST_JSON}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def _file(path: Path) -> Source:
    check_regular(path)
    indexed = path.name.endswith(".safetensors.index.json")
    if indexed or _STANDARD.match(path.name):
        named = _named(path.parent)
        if named is not None and named != path:
            raise CheckpointError(f"{path.parent / CONFIG} describes {named.name}, not {path.name}; open the folder")
    if indexed:
        return _indexed(path)
    refuse_files([path.name], alone=True)
    return Source(path=path, files=(path,), folder=path.parent if _STANDARD.match(path.name) else None)


def _named(folder: Path) -> Path | None:
    """The weights that config.json names, as a save does until those of standard names are in place."""
    name = (config_in(folder, CONFIG) or {}).get(WEIGHTS)
    if name is None:
        return None
    where = f"{folder / CONFIG} names {name!r} as its weights ({WEIGHTS})"
    if not isinstance(name, str) or not _is_plain(name):
        raise CheckpointError(f"{where}; it must be the name of a file in its folder")
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"{where}; only .safetensors files and their indexes are read")
    if not os.path.exists(folder / name):
        raise CheckpointError(f"{where}, which is not there")
    return folder / name


def _folder(path: Path) -> Source:
    try:
        names = sorted(entry.name for entry in path.iterdir() if not entry.is_dir())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    refuse_files(names)
    if named := _named(path):
        return _indexed(named) if named.suffix == ".json" else Source(path=path, files=(named,), folder=path)
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    files = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    # As transformers has it: one whole file before an index, which is then of an earlier save.
    for stem in _STEMS:
        if f"{stem}.safetensors" in files:
            return Source(path=path, files=(path / f"{stem}.safetensors",), folder=path)
        if f"{stem}.safetensors.index.json" in indexes:
            return _indexed(path / f"{stem}.safetensors.index.json")
    if indexes:
        return _indexed(path / _only(path, _preferred(indexes)))
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


def _is_plain(name: str) -> bool:
    """Whether this is the name of something in a folder, and not a way out of it."""
    return Path(name).name == name and name not in ("", "..") and "\0" not in name


def _preferred(names: list[str]) -> list[str]:
    for stem in _STEMS:
        if found := [name for name in names if name.startswith(f"{stem}.")]:
            return found
    return names


def _only(path: Path, names: list[str]) -> str:
    if len(names) > 1:
        raise CheckpointError(f"{path} holds several checkpoints: {', '.join(names)}; pass the path of one of them")
    return names[0]


def _nothing(path: Path, names: list[str]) -> str:
    pickles = [name for name in names if name.endswith(PICKLES)]
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
    if other := [key for key, name in index.items() if not isinstance(name, str)]:
        raise CheckpointError(f"{path} must map every key to the name of a file; {other[0]} has {index[other[0]]!r}")
    names = sorted(set(index.values()))
    if outside := [name for name in names if not _is_plain(name)]:
        raise CheckpointError(f"{path} lists shards outside its folder: {', '.join(outside)}")
    missing = [name for name in names if not os.path.exists(path.parent / name)]
    if missing:
        raise CheckpointError(f"{path} lists {len(names)} shards, {len(missing)} of them missing: {', '.join(missing)}")
    return Source(path=path, files=tuple(path.parent / name for name in names), index=index, folder=path.parent)
