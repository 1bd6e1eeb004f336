"""Arguments that several subcommands have, and the types of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from ..checkpoint import Checkpoint, open_checkpoint

SOURCE = "a folder, a .safetensors file, an index, or an id on the Hub (owner/name)"


def source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=SOURCE)
    parser.add_argument("--raw", action="store_true", help="FP8 tensors without a scale hold the values themselves")
    hub_arguments(parser)


def hub_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a repository on the Hub")
    parser.add_argument("--cache-dir", help="where downloads are stored")
    parser.add_argument("--offline", action="store_true", help="use only files that were downloaded before")


def opened(arguments: argparse.Namespace, source: str | None = None) -> Checkpoint:
    """The checkpoint that ``source``, or the argument of that name, says."""
    return open_checkpoint(
        source or arguments.source,
        revision=arguments.revision,
        cache_dir=arguments.cache_dir,
        offline=arguments.offline,
        raw=getattr(arguments, "raw", False),
    )


def listed(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type for a comma-separated list of ``one``."""

    def split(text: str) -> list[Any]:
        return [one(part) for part in text.split(",")]

    split.__name__ = f"list of {one.__name__}"  # the name in argparse's errors
    return split


def shape(text: str) -> tuple[int, int]:
    """An argparse type for ``NxK``."""
    n, k = text.split("x")
    return int(n), int(k)


def device(text: str) -> torch.device:
    """An argparse type for a torch device."""
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a torch device") from error
