"""The CPU kernels: one C++ file, compiled on first use, called through ctypes."""

from __future__ import annotations

import functools

from .build import Unavailable, build, cache_directory
from .library import TYPES, Instructions, Library, open_library
from .memory import plain

__all__ = ["TYPES", "Instructions", "Library", "Unavailable", "build", "cache_directory", "find", "loaded", "plain"]


@functools.cache
def find() -> Library | Unavailable:
    """The compiled kernels, or the reason why there are none; a process compiles or loads them once.

    Two threads that are first at once both get here, and both end with the same file: nothing waits, so that a fork
    in between cannot leave a lock behind.
    """
    built = build()
    return built if isinstance(built, Unavailable) else open_library(built)


def loaded() -> Library | None:
    """The compiled kernels, or None where there are none."""
    found = find()
    return found if isinstance(found, Library) else None
