"""FP8 checkpoints, engines and benchmarks on the command line: one function per subcommand. Only this module prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, get_args

import torch

from . import bench, doctor
from .analysis.calibration import model_and_inputs
from .analysis.checkpoints import estimate_checkpoint
from .analysis.gain import Estimate
from .analysis.measure import measure
from .analysis.measurement import Measurement
from .analysis.metrics import MetricName
from .analysis.tune import CANDIDATES, Sensitivity, tune
from .analysis.tuning import Tuning
from .checkpoint import Checkpoint, WriteReport, convert_checkpoint, open_checkpoint, quantize_checkpoint
from .checkpoint.inspection import Inspection, inspect
from .checkpoint.outline import CheckpointReport, outline
from .checkpoint.readers import ReaderName
from .errors import CheckpointError, UnsupportedError
from .models.recipe import Recipe
from .scaled import FP8GemmOptions, SchemeName


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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns 0 on success, 1 on failure, and exits with 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="fp8gemm", description=__doc__.split(":")[0] if __doc__ else None)
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


_SOURCE = "a folder, a .safetensors file, an index, or an id on the Hub (owner/name)"


def _source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=_SOURCE)
    parser.add_argument("--raw", action="store_true", help="FP8 tensors without a scale hold the values themselves")
    _hub_arguments(parser)


def _hub_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a repository on the Hub")
    parser.add_argument("--cache-dir", help="where downloads are stored")
    parser.add_argument("--offline", action="store_true", help="use only files that were downloaded before")


def _opened(arguments: argparse.Namespace, source: str | None = None) -> Checkpoint:
    return open_checkpoint(
        source or arguments.source,
        revision=arguments.revision,
        cache_dir=arguments.cache_dir,
        offline=arguments.offline,
        raw=getattr(arguments, "raw", False),
    )


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    parser.add_argument("--check", action="store_true", help="also read every weight and check it for NaN")


def _inspect(arguments: argparse.Namespace) -> Inspection:
    return inspect(_opened(arguments), check=arguments.check)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    parser.add_argument("--html", metavar="FILE", help="also write the report as a page to this file")


def _report(arguments: argparse.Namespace) -> CheckpointReport:
    found = outline(_opened(arguments))
    if arguments.html:
        found.to_html(arguments.html)
    return found


def _estimate_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
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
    found = estimate_checkpoint(_opened(arguments), **given)
    if arguments.html:
        found.to_html(arguments.html)
    return found


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
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
        _opened(arguments),
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
        _opened(arguments),
        arguments.directory,
        scheme=arguments.scheme,
        ignore=arguments.ignore,
        format=arguments.format,
        reader=arguments.reader,
        max_shard_size=arguments.max_shard_size,
        device=arguments.device,
        fp8_heads=arguments.fp8_heads,
    )


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--shapes", type=_listed(_shape), help="weight shapes NxK, by default 4096x4096,28672x4096")
    weights.add_argument("--model", help=f"with --tune: the shapes and kinds in an FP8 checkpoint, {_SOURCE}")
    parser.add_argument("--tokens", type=_listed(int), help="values of M, for example 1,16,64")
    parser.add_argument("--device", type=_device, help="cuda, cuda:1 or cpu; by default cuda if there is a GPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="timing duration for each shape and M")
    parser.add_argument("--scheme", choices=get_args(SchemeName), help="for weights and activations, by default row")
    parser.add_argument("--engines", type=_listed(str), help="auto and engine names, by default those auto considers")
    parser.add_argument("--tune", action="store_true", help="tune the Triton engine's plans, and write its table")
    parser.add_argument("--kinds", type=_listed(str), help="with --tune: any of row, block, weight; by default all")
    parser.add_argument("--overwrite", action="store_true", help="with --tune: start a new table")
    _hub_arguments(parser)


def _listed(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type for a comma-separated list of ``one``."""

    def listed(text: str) -> list[Any]:
        return [one(part) for part in text.split(",")]

    listed.__name__ = f"list of {one.__name__.strip('_')}"  # the name in argparse's errors
    return listed


def _shape(text: str) -> tuple[int, int]:
    n, k = text.split("x")
    return int(n), int(k)


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a torch device") from error


def _bench(arguments: argparse.Namespace) -> bench.Comparison | bench.Tuning:
    other = ("scheme", "engines") if arguments.tune else ("model", "kinds", "overwrite")
    if wrong := [f"--{name}" for name in other if getattr(arguments, name)]:
        raise ValueError(f"{', '.join(wrong)} cannot be used {'with' if arguments.tune else 'without'} --tune")
    names = ("tokens", "device", "seconds", "kinds", "overwrite", "scheme", "engines")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    if not arguments.tune:
        return bench.bench(arguments.shapes or bench.SHAPES, **given)
    what = _opened(arguments, arguments.model) if arguments.model else arguments.shapes or bench.SHAPES
    return bench.tune(what, **given)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--probe",
        default="cpu",
        choices=doctor.PROBES,
        help="where the engines run exact products, in a process of their own: by default on the CPU; all compiles "
        "kernels on accelerators",
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        help="a module that registers engines of yours, for that process",
    )


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the inputs on which it is run."""
    parser.add_argument("model", help="a folder or an id on the Hub that transformers loads")
    parser.add_argument(
        "--data", required=True, help="a text file, each line a sequence; or a .safetensors file of inputs by name"
    )
    parser.add_argument("--engine", default="reference", help="what computes; by default exactly what the scheme says")
    parser.add_argument("--filter", action="append", help="only layers of this pattern; with ! in front all others")
    parser.add_argument("--max-tokens", type=int, default=512, help="where longer lines are cut")
    parser.add_argument("--device", type=_device, default="cpu", help="where to compute, by default the CPU")
    _hub_arguments(parser)


def _model_and_inputs(arguments: argparse.Namespace) -> tuple[torch.nn.Module, object]:
    where = {name: getattr(arguments, name) for name in ("revision", "cache_dir", "offline", "device", "max_tokens")}
    return model_and_inputs(arguments.model, arguments.data, **where)


def _measure_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--scheme", default="row", choices=get_args(SchemeName), help="for weights and activations")
    how.add_argument("--recipe", help="the file of a recipe, instead of a scheme")
    parser.add_argument("--html", help="also write a page with heat maps to this file")


def _measure(arguments: argparse.Namespace) -> Measurement:
    recipe = Recipe.of(arguments.recipe or FP8GemmOptions(scheme=arguments.scheme))
    recipe = replace(recipe, options=replace(recipe.options, engine=arguments.engine))
    model, inputs = _model_and_inputs(arguments)
    found = measure(model, inputs, options=recipe, module_filter=arguments.filter)
    if arguments.html:
        found.to_html(arguments.html)
    return found


def _tune_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--budget", type=float, required=True, help="what the metric may be at most; PSNR: at least")
    parser.add_argument("--metric", default="cosine", choices=get_args(MetricName), help="of the model's outputs")
    parser.add_argument("--candidates", type=_listed(str), default=CANDIDATES, help="schemes, the preferred one first")
    parser.add_argument("--sensitivity", default="layers", choices=get_args(Sensitivity), help="what to try first")
    parser.add_argument("--output", required=True, help="the file to write the recipe to")
    parser.add_argument("--html", help="also write a page with a plot of all variants to this file")


def _tune(arguments: argparse.Namespace) -> Tuning:
    model, inputs = _model_and_inputs(arguments)
    names = ("budget", "metric", "candidates", "sensitivity")
    given = {name: getattr(arguments, name) for name in names}
    options = FP8GemmOptions(engine=arguments.engine)
    found = tune(model, inputs, options=options, module_filter=arguments.filter, **given)
    # The engine is for the search; whoever uses the recipe has the fastest one.
    found = replace(found, recipe=replace(found.recipe, options=replace(found.recipe.options, engine="auto")))
    found.recipe.save(arguments.output)
    if arguments.html:
        found.to_html(arguments.html)
    return found


COMMANDS: dict[str, Command] = {
    "bench": Command(
        help="time bfloat16 and every engine; with --tune, tune the Triton engine's plans for this GPU",
        arguments=_bench_arguments,
        run=_bench,
    ),
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
    "doctor": Command(
        help="show what this machine can run, with which engine, and why not with the others",
        arguments=_doctor_arguments,
        run=lambda arguments: doctor.examine(probe=arguments.probe, imports=arguments.imports),
    ),
    "estimate": Command(
        help="show how many bytes FP8 would save in a checkpoint, without reading its weights",
        arguments=_estimate_arguments,
        run=_estimate,
    ),
    "measure": Command(
        help="measure what FP8 does to the output of each layer of a model, given texts or other inputs",
        arguments=_measure_arguments,
        run=_measure,
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
    "tune": Command(
        help="find which layers to keep or to give another scheme, so that the outputs of a model stay within a budget",
        arguments=_tune_arguments,
        run=_tune,
    ),
}

if __name__ == "__main__":
    raise SystemExit(main())
