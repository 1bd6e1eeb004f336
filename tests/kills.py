"""Kills a save at every system call that changes its folder, and asks what a reader finds there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from fp8gemm import CheckpointError
from fp8gemm.checkpoint import open_checkpoint

CHANGES = {"os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "os.mkdir", "os.rmdir"}


class Killed(BaseException):
    """Nothing in the package catches it."""


class Watch:
    """Sees every system call that changes ``folder``; from number ``last`` on, none is made any more."""

    folder: str | None = None
    last: int | None = None
    kill: Callable[[], object] | None = None
    calls: list[str]


def _changes(event: str, arguments: tuple[Any, ...]) -> str:
    """The path within the watched folder that a call is about to change, or nothing."""
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        paths = arguments[:1]
    else:
        paths = arguments[:2] if event in CHANGES else ()
    for path in paths:
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(Watch.folder or "\0"):
            return os.fspath(path)
    return ""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if Watch.folder is not None and (path := _changes(event, arguments)):
        # Bytes of a file that readers see are never written in place: they would be there half.
        assert event != "open" or not os.path.exists(path), f"{path} is written in place"
        if Watch.last is not None and len(Watch.calls) >= Watch.last:
            assert Watch.kill is not None
            Watch.kill()
        Watch.calls.append(f"{event} {os.path.basename(path)}")


sys.addaudithook(_hook)


def die() -> None:
    raise Killed


@contextmanager
def watched(folder: Path, last: int | None, kill: Callable[[], object] = die) -> Iterator[None]:
    Watch.folder, Watch.last, Watch.kill, Watch.calls = str(folder), last, kill, []
    try:
        yield
    finally:
        Watch.folder = None


def state(folder: Path, read: Callable[[Path], Any], old: Any, new: Any) -> str:
    """Which of the two a reader finds; what it finds if it is neither."""
    try:
        found = read(folder)
    except CheckpointError as error:
        return "old" if old is None else f"unreadable: {error}"
    if found == old:
        return "old"
    return "new" if found == new else found if isinstance(found, str) else "a mixture"


def after_kills(
    folder: Path, before: Callable[[Path], Any], save: Callable[[Path], Any], read: Callable[[Path], Any]
) -> tuple[list[str], list[str]]:
    """What a reader finds after a kill before each call, then at the end; and the calls."""
    whole = folder / "whole"
    before(whole)
    old = read(whole) if any(whole.iterdir()) else None
    with watched(whole, None):
        save(whole)
    calls, new = Watch.calls, read(whole)
    states = []
    for last in range(len(calls)):
        place = folder / str(last)
        before(place)
        with watched(place, last), pytest.raises(Killed):
            save(place)
        states.append(state(place, read, old, new))
        save(place)
        assert state(place, read, old, new) == "new"
        assert leftovers(place) == set()
    return [*states, "new"], calls


def leftovers(folder: Path) -> set[str]:
    """The weights, indexes and hidden files that are no part of the checkpoint in the folder."""
    source = open_checkpoint(folder).source
    names = {path.name for path in folder.iterdir() if ".safetensors" in path.name or path.name.startswith(".")}
    return names - {path.name for path in (*source.files, source.path)}


def switched_once(states: list[str]) -> bool:
    """Old ones first, then new ones, and nothing else."""
    return [state for state, _ in groupby(states)] == ["old", "new"]


def raising(error: BaseException) -> Callable[[], object]:
    def kill() -> None:
        Watch.last = None  # once
        raise error

    return kill
