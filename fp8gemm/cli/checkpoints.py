"""Subcommands for checkpoints: what is in one, and writing another."""

from __future__ import annotations

import argparse
from typing import get_args

from ..analysis.checkpoints import estimate_checkpoint
from ..analysis.gain import Estimate
from ..checkpoint import WriteReport, convert_checkpoint, quantize_checkpoint
from ..checkpoint.inspection import Inspection, inspect
from ..checkpoint.outline import CheckpointReport, outline
from ..checkpoint.readers import ReaderName
from ..scaled import SchemeName
from .arguments import opened, source_arguments
from .command import Command


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    source_arguments(parser)
    parser.add_argument("--check", action="store_true", help="also read every weight and check it for NaN")


def _inspect(arguments: argparse.Namespace) -> Inspection:
    return inspect(opened(arguments), check=arguments.check)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    source_arguments(parser)
    parser.add_argument("--html", metavar="FILE", help="also write the report as a page to this file")


def _report(arguments: argparse.Namespace) -> CheckpointReport:
    found = outline(opened(arguments))
    if arguments.html:
        found.to_html(arguments.html)
    return found


def _estimate_arguments(parser: argparse.ArgumentParser) -> None:
    source_arguments(parser)
    _choice_arguments(parser)
    parser.add_argument("--html", metavar="FILE", help="also write the estimate as a page to this file")


def _choice_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scheme", default="row", choices=get_args(SchemeName), help="for weights and activations")
    parser.add_argument(
        "--ignore", action="append", default=[], help="module to skip: a name, with * and ?, or re:regex"
    )
    parser.add_argument(
        "--fp8-heads", action="store_true", help="quantize output heads too; serving engines do not read them"
    )


def _estimate(arguments: argparse.Namespace) -> Estimate:
    given = {name: getattr(arguments, name) for name in ("scheme", "ignore", "fp8_heads")}
    found = estimate_checkpoint(opened(arguments), **given)
    if arguments.html:
        found.to_html(arguments.html)
    return found


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    source_arguments(parser)
    parser.add_argument("directory", help="where to write: a folder, or for comfy a .safetensors file")
    parser.add_argument("--format", help="compressed-tensors (the default), fine-grained or comfy")
    parser.add_argument(
        "--for",
        dest="reader",
        choices=get_args(ReaderName),
        help="the program that is to run it: writes the format that it takes with these scales, or says why none",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="for example 5GB or 500MiB")


def _convert(arguments: argparse.Namespace) -> WriteReport:
    return convert_checkpoint(
        opened(arguments),
        arguments.directory,
        format=arguments.format,
        reader=arguments.reader,
        max_shard_size=arguments.max_shard_size,
    )


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
    _convert_arguments(parser)
    _choice_arguments(parser)
    parser.add_argument("--device", help="where to compute, for example cuda; by default the CPU")


def _quantize(arguments: argparse.Namespace) -> WriteReport:
    return quantize_checkpoint(
        opened(arguments),
        arguments.directory,
        scheme=arguments.scheme,
        ignore=arguments.ignore,
        format=arguments.format,
        reader=arguments.reader,
        max_shard_size=arguments.max_shard_size,
        device=arguments.device,
        fp8_heads=arguments.fp8_heads,
    )


COMMANDS = {
    "inspect": Command(
        help="show what a checkpoint contains, and anything suspicious",
        arguments=_inspect_arguments,
        run=_inspect,
    ),
    "convert": Command(
        help="write an FP8 checkpoint in another format, with the same bytes and scales",
        arguments=_convert_arguments,
        run=_convert,
    ),
    "estimate": Command(
        help="show how many bytes FP8 would save in a checkpoint, without reading its weights",
        arguments=_estimate_arguments,
        run=_estimate,
    ),
    "report": Command(
        help="show each matrix of a checkpoint: FP8 or dense, its scheme and size, as text or a page",
        arguments=_report_arguments,
        run=_report,
    ),
    "quantize": Command(
        help="make an FP8 checkpoint from a bfloat16 one",
        arguments=_quantize_arguments,
        run=_quantize,
    ),
}
