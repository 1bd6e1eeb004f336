"""Subcommands for this machine: what it can run, and how fast."""

from __future__ import annotations

import argparse
from typing import get_args

from .. import bench, doctor
from ..scaled import SchemeName
from .arguments import SOURCE, device, hub_arguments, listed, opened, shape
from .command import Command


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--shapes", type=listed(shape), help="weight shapes NxK, by default 4096x4096,28672x4096")
    weights.add_argument("--model", help=f"with --tune: the shapes and kinds in an FP8 checkpoint, {SOURCE}")
    parser.add_argument("--tokens", type=listed(int), help="values of M, for example 1,16,64")
    parser.add_argument("--device", type=device, help="cuda, cuda:1 or cpu; by default cuda if there is a GPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="timing duration for each shape and M")
    parser.add_argument("--scheme", choices=get_args(SchemeName), help="for weights and activations, by default row")
    parser.add_argument("--engines", type=listed(str), help="auto and engine names, by default those auto considers")
    parser.add_argument("--tune", action="store_true", help="tune the Triton engine's plans, and write its table")
    parser.add_argument("--kinds", type=listed(str), help="with --tune: any of row, block, weight; by default all")
    parser.add_argument("--overwrite", action="store_true", help="with --tune: start a new table")
    hub_arguments(parser)


def _bench(arguments: argparse.Namespace) -> bench.Comparison | bench.Tuning:
    other = ("scheme", "engines") if arguments.tune else ("model", "kinds", "overwrite")
    if wrong := [f"--{name}" for name in other if getattr(arguments, name)]:
        raise ValueError(f"{', '.join(wrong)} cannot be used {'with' if arguments.tune else 'without'} --tune")
    names = ("tokens", "device", "seconds", "kinds", "overwrite", "scheme", "engines")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    if not arguments.tune:
        return bench.bench(arguments.shapes or bench.SHAPES, **given)
    what = opened(arguments, arguments.model) if arguments.model else arguments.shapes or bench.SHAPES
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


COMMANDS = {
    "bench": Command(
        help="time bfloat16 and every engine; with --tune, tune the Triton engine's plans for this GPU",
        arguments=_bench_arguments,
        run=_bench,
    ),
    "doctor": Command(
        help="show what this machine can run, with which engine, and why not with the others",
        arguments=_doctor_arguments,
        run=lambda arguments: doctor.examine(probe=arguments.probe, imports=arguments.imports),
    ),
}
