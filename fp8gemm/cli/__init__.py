"""FP8 checkpoints, models, engines and benchmarks on the command line. Only this package prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ..errors import CheckpointError, UnsupportedError
from . import checkpoints, machine, models
from .command import Command

COMMANDS: dict[str, Command] = dict(sorted({**checkpoints.COMMANDS, **machine.COMMANDS, **models.COMMANDS}.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns 0 on success, 1 on failure, and exits with 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="fp8gemm", description=__doc__ and __doc__.split(". ")[0])
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        subparser.add_argument("--json", action="store_true", help="print JSON instead of text")
        command.arguments(subparser)
    arguments = parser.parse_args(argv)
    command = COMMANDS[arguments.command]
    try:
        found = command.run(arguments)
    except (CheckpointError, UnsupportedError, ValueError, OSError) as error:
        if arguments.json:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        print(f"fp8gemm {arguments.command}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
    return int(getattr(found, "failed", False))
