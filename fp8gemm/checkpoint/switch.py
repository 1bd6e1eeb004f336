"""Puts a new checkpoint in the place of the one in a folder, in one step.

The new files get names that nothing reads yet; then one rename of ``config.json`` switches to them: the new config
names the new weights, by the key ``transformers_weights``, which transformers knows too. What follows gives them their
usual names, takes that key out again and removes the old files; whoever opens the folder in between, or after a save
that was killed, finds the old checkpoint or the new one.

Readers that do not know the key (vLLM, diffusers) go by ``config.json`` and the standard names, which are two renames
in direct succession; each of them also finds its weights complete, old or new, at every moment.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError
from ..formats.config import OWN_FILES
from .files import Tensors
from .hub import Hub
from .locate import CONFIG, INDEX, WEIGHTS, WHOLE, config_in, locate

_OURS = re.compile(r"^model((-\d+)?-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?$")
_HIDDEN = re.compile(r"^\.fp8gemm-[0-9a-f]{8}\.")
_QUANTIZED = ("quantization_config", "compression_config")


class Replacement:
    """A checkpoint on its way into ``folder``; ``replacing`` makes one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._weights = ""
        self._prefix = f".fp8gemm-{secrets.token_hex(4)}."
        self._made: list[Path] = []
        self._settled = False
        self._config: Mapping[str, Any] = {}
        try:
            self._config = config_in(folder, CONFIG) or {}
        except CheckpointError:
            if (folder / CONFIG).is_dir():  # which no rename replaces
                raise

    @property
    def switched(self) -> bool:
        """Whether the new checkpoint is the one in the folder; an interrupt may come before anything notes it."""
        named = (config_in(self.folder, CONFIG) or {}).get(WEIGHTS) if self._weights and not self._settled else None
        return self._settled or (named is not None and named == self._weights)

    def write(self, name: str, fill: Callable[[BinaryIO], object]) -> Path:
        """A new file that ``fill`` writes, complete on the disk, under a name that nobody reads."""
        path = self.folder / f"{self._prefix}{len(self._made)}.{name}"
        self._made.append(path)
        with path.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        return path

    def put(self, name: str, content: Mapping[str, Any]) -> Path:
        """A JSON file, whole at every moment."""
        text = json.dumps(content, indent=2) + "\n"
        os.replace(self.write(name, lambda file: file.write(text.encode())), self.folder / name)
        return self.folder / name

    def finish(
        self, files: Sequence[Path], keys: Sequence[Iterable[str]], config: Mapping[str, Any] | None, total: int
    ) -> list[Path]:
        """Switches to ``files``, each with its ``keys``; returns them, the index and the config by their last names.

        Without a ``config`` that of the folder stays, but for its description of FP8 weights.
        """
        last = {key: value for key, value in (self._config if config is None else config).items() if key != WEIGHTS}
        if config is None:
            last = {key: value for key, value in last.items() if key not in _QUANTIZED}
        names = [WHOLE]
        if len(files) > 1:
            self._pin()
            names = self._free_names(len(files))
            for file, name in zip(files, names, strict=True):
                self._made.append(self.folder / name)
                os.replace(file, self.folder / name)
        weight_map = dict(sorted((key, name) for name, held in zip(names, keys, strict=True) for key in held))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        weights = files[0]
        if len(files) > 1:
            text = json.dumps(index, indent=2) + "\n"
            weights = self.write(INDEX, lambda file: file.write(text.encode()))
        sync(self.folder)
        self._weights = weights.name
        self.put(CONFIG, {**last, WEIGHTS: weights.name})
        self._settled = True
        sync(self.folder)
        self._settle(weights, index, last)
        indexes = [INDEX] if len(files) > 1 else []
        return [self.folder / name for name in (*names, *indexes, *([CONFIG] if config is not None else []))]

    def _settle(self, weights: Path, index: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Gives the weights their standard names, and removes everything else."""
        whole = weights.suffix == ".safetensors"
        if whole:
            self._name(weights, WHOLE)
        # Also beside a whole file, until the shards of an old index are gone: vLLM would read all that no index leaves.
        if not whole or (self.folder / INDEX).exists():
            self.put(INDEX, index)
        if not whole:
            _remove(self.folder / WHOLE)
        sync(self.folder)
        if config:
            self.put(CONFIG, config)
        else:
            _remove(self.folder / CONFIG)
        sync(self.folder)
        kept = {WHOLE, INDEX, *index["weight_map"].values()}
        for path in sorted(self.folder.iterdir()):
            stale = _OURS.match(path.name) or _HIDDEN.match(path.name) or path.name in OWN_FILES
            if stale and path.name not in kept:
                _remove(path)
        if whole:
            _remove(self.folder / INDEX)

    def _pin(self) -> None:
        """An index of the old checkpoint, if it has none: for readers that take all files that no index leaves out."""
        if not (self.folder / INDEX).exists():
            try:
                held = Tensors(locate(self.folder, Hub())).file_of
            except CheckpointError:
                held = {}
            self._made.append(self.folder / INDEX)
            self.put(INDEX, {"weight_map": held})

    def _free_names(self, count: int) -> list[str]:
        number = 1
        while True:
            stem = "model" if number == 1 else f"model-{number}"
            names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
            if not any((self.folder / name).exists() for name in names):
                return names
            number += 1

    def _name(self, path: Path, name: str) -> None:
        """Gives ``path`` a second name, in one step even if that is taken."""
        second = self.folder / f"{path.name}.link"
        try:
            os.link(path, second)
        except OSError:  # a file system without links
            second = self.write(name, partial(_copy, path))
        os.replace(second, self.folder / name)

    def clear(self) -> None:
        """Removes what earlier saves left when they were killed, but not what config.json has been switched to."""
        for path in sorted(self.folder.iterdir()):
            if _HIDDEN.match(path.name) and path.name != self._config.get(WEIGHTS):
                _remove(path)

    def undo(self) -> None:
        for path in reversed(self._made):
            with contextlib.suppress(OSError):
                _remove(path)


@contextlib.contextmanager
def replacing(directory: str | os.PathLike[str]) -> Iterator[Replacement]:
    """A replacement of the checkpoint in ``directory``, which is made if need be; one at a time, also among processes.

    Raises:
        CheckpointError: writing failed. Unless the new checkpoint is in place already, nothing has changed.
    """
    folder = Path(directory)
    new = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            new = Replacement(folder)
            try:
                new.clear()
                yield new
            except BaseException:
                if not new.switched:
                    new.undo()
                raise
    except OSError as error:
        left = "nothing incomplete was left there"
        if new is not None and new.switched:
            left = "it holds the new checkpoint, and the next save removes what is left of the old one"
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}; {left}") from error


def copy_into(paths: Iterable[Path], directory: str | os.PathLike[str]) -> None:
    """Copies files into ``directory``, each of them whole at every moment.

    Raises:
        CheckpointError: one cannot be copied.
    """
    with replacing(directory) as new:
        for path in paths:
            os.replace(new.write(path.name, partial(_copy, path)), new.folder / path.name)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for other saves into ``folder``, such as those of other ranks; the system ends it with the process."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _copy(path: Path, file: BinaryIO) -> None:
    with path.open("rb") as source:
        shutil.copyfileobj(source, file, 1 << 24)


def sync(folder: Path) -> None:
    """Has the disk hold the folder's names, which renames change, before anything that relies on them."""
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no folders
                raise
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
