"""The share of a model's multiply-adds that runs on FP8 after enable_fp8_gemm, over all installed architectures.

    python benchmarks/coverage.py [PATTERN] [--save NAME]

Small random models of transformers, diffusers, torchvision, timm and torch itself. Each runs dense, patched, and with
its FP8 weights dequantized. A model that cannot be made or run dense is skipped, with the reason. PATTERN is a regular
expression, matched against names such as ``transformers/llama``. Rows of a saved file that are not measured again are
kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import tiny_diffusers
import tiny_models
import tiny_modules
import torch
from harness import RESULTS, save, table
from torch import nn
from torch.utils._pytree import tree_leaves

from fp8gemm import FP8GemmOptions, disable_fp8_gemm, enable_fp8_gemm, report
from fp8gemm.weights.report import Report

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
COLUMNS = ["name", "class", "fp8", "dense", "dequantized", "own error", "error", "status"]
SECONDS = 120  # per model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="a regular expression: only models whose name matches")
    parser.add_argument("--save", help="write benchmarks/results/SAVE.json")
    parser.add_argument("--new", action="store_true", help="only what the saved file does not have yet")
    arguments = parser.parse_args()
    path = RESULTS / f"{arguments.save}.json"
    former = json.loads(path.read_text())["rows"] if arguments.save and path.is_file() else []
    rows = {row["name"]: row for row in former}
    signal.signal(signal.SIGALRM, _late)
    fresh = []
    try:
        for name, make in cases():
            if re.search(arguments.pattern, name) and not (arguments.new and name in rows):
                signal.alarm(SECONDS)
                rows[name] = measure(name, make)
                signal.alarm(0)
                fresh.append(rows[name])
                print(line(rows[name]), flush=True)
    finally:
        print(table([{**row, "status": row["status"][:60]} for row in fresh], COLUMNS))
        print(summary(fresh))
        if arguments.save:
            print(save(arguments.save, [rows[name] for name in sorted(rows)], **versions()))


def line(row: dict[str, Any]) -> str:
    """A row as it is printed while others are still running."""
    numbers = [f"{row[key]:.4g} {key}" for key in ("fp8", "dequantized", "own error", "error") if key in row]
    return ", ".join([row["name"], *numbers, row["status"], row.get("left", "")])


def cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Everything that can be measured, by name."""
    for library, module in (("torch", tiny_modules), ("diffusers", tiny_diffusers), ("transformers", tiny_models)):
        for name in module.architectures():
            yield f"{library}/{name}", lambda module=module, name=name: module.build(name)
    for library in ("torchvision", "timm"):
        for name in tiny_modules.vision(library):
            yield f"{library}/{name}", lambda library=library, name=name: tiny_modules.build_vision(library, name)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for library in ("transformers", "diffusers", "torchvision", "timm"):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = None
    return found


def measure(name: str, make: Callable[[], Case]) -> dict[str, Any]:
    """One row; an error after patching is its status."""
    start = time.perf_counter()
    row: dict[str, Any] = {"name": name}
    try:
        model, args, kwargs = make()
        row["class"] = type(model).__name__
        dense = run(model, args, kwargs)
    except Exception as error:
        return {**row, "status": f"skipped: {str(error)[:400] or type(error).__name__}"}
    else:
        try:
            row.update(patched(model, args, kwargs, dense))
        except TimeoutError as error:
            row["status"] = f"skipped: {error}"
        except Exception as error:
            row["status"] = f"FAILED: {type(error).__name__}: {str(error)[:400]}"
        return {**row, "seconds": round(time.perf_counter() - start, 1)}


def _late(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def patched(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dense: list[torch.Tensor]
) -> dict[str, Any]:
    """Where the patched model's multiply-adds run, and how far its output is from the dense model's."""
    bare = tiny_modules.BARE in model.__dict__
    enable_fp8_gemm(model, options=FP8GemmOptions(strict=False), example_inputs=args if bare else None)
    fp8 = run(model, args, kwargs)
    found = report(model)
    coverage = found.coverage
    assert coverage is not None
    dequantized, _ = disable_fp8_gemm(copy.deepcopy(model))
    own = apart(fp8, run(dequantized, args, kwargs))
    total = max(coverage.total, 1)
    return {
        "fp8": coverage.share,
        "dense": sum(coverage.dense.values()) / total,
        "dequantized": sum(coverage.dequantized.values()) / total,
        "own error": own,
        "error": apart(fp8, dense),
        "left": left(found),
        "status": "ok" if own < 1e-2 else "FAILED: it differs from the model with dequantized weights",
    }


def run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The floating-point tensors of an output."""
    torch.manual_seed(0)
    with torch.no_grad():
        y = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    leaves = tree_leaves(dict(y) if isinstance(y, dict) else vars(y) if hasattr(y, "latent_dist") else y)
    found = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    if not found:
        raise ValueError(f"no tensor in an output of type {type(y).__name__}")
    return found


def apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The relative distance of two outputs over elements finite in both; infinite if an element is finite in only
    one."""
    difference = size = 0.0
    for one, other in zip(found, expected, strict=True):
        one, other = one.double(), other.double()
        if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
            return float("inf")
        difference += float((one - other).nan_to_num(0, 0, 0).square().sum())
        size += float(other.nan_to_num(0, 0, 0).square().sum())
    return (difference / size) ** 0.5 if size else difference**0.5


def left(found: Report) -> str:
    """The largest weights that did not run on FP8, with shares and reasons."""
    coverage = found.coverage
    assert coverage is not None
    reasons = {key: row.reason for row in found.rows for key in (row.name, f"{row.name}.weight") if row.reason}
    slow = {**coverage.dense, **coverage.dequantized}
    parts: dict[tuple[str, str], int] = Counter()
    for name, count in slow.items():
        why = "dequantized" if name in coverage.dequantized else reasons.get(name, "dense")
        parts[re.sub(r"\.\d+\.", ".*.", name), why] += count
    largest = sorted(parts.items(), key=lambda item: -item[1])[:4]
    return "; ".join(f"{name} {count / coverage.total:.2%}: {why}" for (name, why), count in largest)


def summary(rows: list[dict[str, Any]]) -> str:
    ran = [row for row in rows if "fp8" in row]
    counts = {
        "ran": len(ran),
        "at least 99 % on FP8": sum(row["fp8"] >= 0.99 for row in ran),
        "with dequantized products": sum(row["dequantized"] > 0 for row in ran),
        "failed": sum(row["status"].startswith("FAILED") for row in rows),
        "skipped": sum(row["status"].startswith("skipped") for row in rows),
    }
    missing = [f"{library} is not installed" for library, version in versions().items() if version is None]
    return ", ".join([*(f"{count} {what}" for what, count in counts.items()), *missing])


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    main()
