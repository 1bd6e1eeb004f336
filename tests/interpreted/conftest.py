"""Kernels on CPU tensors, in Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/interpreted``.

The interpreter replaces every kernel of a process, so these tests are collected only with that variable;
``tests/engines/test_triton.py`` sets it in a separate process.
"""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter uses functions that newer numpy deprecates, and computes with infinities where tests do."""
    for item in items:
        for text in ("Conversion of an array with ndim > 0:DeprecationWarning", ".*encountered in:RuntimeWarning"):
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{text}"))
