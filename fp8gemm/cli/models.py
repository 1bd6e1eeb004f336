"""Subcommands for models that transformers loads: what FP8 does to their outputs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import get_args

import torch

from ..analysis.calibration import model_and_inputs
from ..analysis.measure import measure
from ..analysis.measurement import Measurement
from ..analysis.metrics import MetricName
from ..analysis.tune import CANDIDATES, Sensitivity, tune
from ..analysis.tuning import Tuning
from ..models.recipe import Recipe
from ..scaled import FP8GemmOptions, SchemeName
from .arguments import device, hub_arguments, listed
from .command import Command


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the inputs on which it is run."""
    parser.add_argument("model", help="a folder or an id on the Hub that transformers loads")
    parser.add_argument(
        "--data", required=True, help="a text file, each line a sequence; or a .safetensors file of inputs by name"
    )
    parser.add_argument("--engine", default="reference", help="what computes; by default exactly what the scheme says")
    parser.add_argument("--filter", action="append", help="only layers of this pattern; with ! in front all others")
    parser.add_argument("--max-tokens", type=int, default=512, help="where longer lines are cut")
    parser.add_argument("--device", type=device, default="cpu", help="where to compute, by default the CPU")
    hub_arguments(parser)


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
    parser.add_argument("--candidates", type=listed(str), default=CANDIDATES, help="schemes, the preferred one first")
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


COMMANDS = {
    "measure": Command(
        help="measure what FP8 does to the output of each layer of a model, given texts or other inputs",
        arguments=_measure_arguments,
        run=_measure,
    ),
    "tune": Command(
        help="find which layers to keep or to give another scheme, so that the outputs of a model stay within a budget",
        arguments=_tune_arguments,
        run=_tune,
    ),
}
