"""The two errors of fp8gemm beside ValueError: each says what was asked, what was found and what would work."""

from __future__ import annotations


class UnsupportedError(RuntimeError):
    """No engine, or not the engine that was named, can do what was asked here."""


class CheckpointError(RuntimeError):
    """A checkpoint file is broken, ambiguous or contradicts itself; the message names the file or tensor."""
