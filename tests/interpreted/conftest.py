"""Kernels on CPU tensors, in Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/interpreted``.

The interpreter takes over every kernel of a process, so these tests are collected only where it was asked for;
``tests/engines/test_triton.py`` asks for it in a process of its own.
"""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter itself uses what newer numpy warns about, and computes with the infinities it is tested with."""
    for item in items:
        for text in ("Conversion of an array with ndim > 0:DeprecationWarning", ".*encountered in:RuntimeWarning"):
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{text}"))
