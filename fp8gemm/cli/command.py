"""A subcommand, and what it finds out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Found(Protocol):
    """What a subcommand found out or did: ``str`` of it is for a person, ``to_dict`` for a program.

    One that may be a failure says so in ``failed``; the exit status is 1 then.
    """

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand: its arguments, and what it finds out or does."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], Found]
