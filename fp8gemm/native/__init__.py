"""The compiled CPU kernels: a C++ source and its headers, compiled for a wheel or at first use, behind ctypes."""

from __future__ import annotations

import functools

from .build import Built, build, cache_directory
from .checks import TYPES
from .compiler import Unavailable
from .library import Library, open_library
from .memory import plain, plain_but_for_modes

__all__ = [
    "TYPES",
    "Built",
    "Library",
    "Unavailable",
    "build",
    "cache_directory",
    "find",
    "loaded",
    "plain",
    "plain_but_for_modes",
]


@functools.cache
def find() -> Library | Unavailable:
    """The compiled kernels, or the reason why there are none; compiled or loaded once per process.

    If two threads call it first at once, both compile, and both end up with the same file: neither waits for a lock,
    which a fork could leave locked forever in the child.
    """
    built = build()
    return built if isinstance(built, Unavailable) else open_library(built)


def loaded() -> Library | None:
    """The compiled kernels; None if there are none."""
    found = find()
    return found if isinstance(found, Library) else None
