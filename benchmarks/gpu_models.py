"""Whole models on a CUDA GPU: blocks like Llama's and FLUX's in bfloat16, fp8gemm and torchao, eager and in CUDA
graphs.

    python benchmarks/gpu_models.py [--cases llama-prefill,...] [--compile] [--save gpu_models]
    python benchmarks/gpu_models.py --device cpu --tiny    to see that it runs; its figures mean nothing

Milliseconds of one forward call, batch size 1, ``--blocks`` blocks with random weights; eager times include waiting for
the host. Each candidate is checked against bfloat16 before it is timed, and left out if it is far off. All candidates
of a case run in turn; medians. ``--compile`` adds torch.compile, for all candidates with the Inductor settings that
torchao recommends, if it is installed. Ends with the project's goals for ``fp8gemm auto``.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from card import PEERS, captured, card_here, card_seconds, fault, load_peers, shortly, with_torchao
from gpu_blocks import Flux, Llama, Sizes, built
from gpu_goals import model_goals, summary
from harness import RESULTS, host, listed, paired_seconds, save, table, wall_seconds
from torch import nn

from fp8gemm import FP8GemmOptions, UnsupportedError, enable_fp8_gemm, fuse_siblings, probe, report
from fp8gemm.engines import order

COLUMNS = ["case", "tokens", "name", "mode", "ms", "x bf16", "error", "runs", "note"]
ALLOWED_ERROR = 0.15  # relative, of the whole stack: each product adds up to 2**-4 of a block's contribution
COMPILED = ("bf16", "fp8gemm auto", "torchao")


@dataclass(frozen=True)
class Case:
    kind: type[nn.Module]
    sizes: Sizes
    tokens: int


LLAMA = Sizes(hidden=4096, heads=32, kv_heads=8, mlp=14336)
FLUX = Sizes(hidden=3072, heads=24, kv_heads=24, mlp=12288)
CASES = {
    "llama-prefill": Case(Llama, LLAMA, 1024),
    "llama-decode": Case(Llama, replace(LLAMA, cached=1024), 1),
    "flux-1024": Case(Flux, FLUX, 1024),
    "flux-4096": Case(Flux, FLUX, 4096),
}
TINY = Sizes(hidden=128, heads=4, kv_heads=2, mlp=256)
SHRUNK = 32  # factor by which --tiny reduces the number of tokens


def main() -> None:
    arguments = parse()
    on_card = arguments.device == "cuda"
    if on_card and not torch.cuda.is_available():
        raise SystemExit(f"{len(arguments.cases)} cases, but no CUDA card: --device cpu --tiny shows that it runs")
    _, notes = load_peers(PEERS, "torchao") if on_card else (None, {})
    where = card_here() if on_card else host()
    print(where)
    rows: list[dict[str, Any]] = []
    for name in arguments.cases:
        case = tiny(CASES[name]) if arguments.tiny else CASES[name]
        case = replace(case, sizes=replace(case.sizes, blocks=arguments.blocks))
        measured = [{"case": name, "tokens": case.tokens, **row} for row in measure(case, arguments)]
        rows += measured
        print(table(measured, COLUMNS), flush=True)
        judged = model_goals(rows) if on_card and not arguments.tiny else []
        if arguments.save:
            asked = {"device": arguments.device, "tiny": arguments.tiny, "peers": notes, "blocks": arguments.blocks}
            more = {**asdict(where), **asked, "goals": judged}
            path = save(arguments.save, rows, directory=arguments.results, **more)
        if on_card and fault():
            print(f"stopped, as a candidate has broken the card for this process: {fault()}")
            break
        gc.collect()
    print(*([path] if arguments.save else []), summary(judged), sep="\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=listed(CASES), default=list(CASES))
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help=f"also compiles {', '.join(COMPILED)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small widths, that any machine runs in seconds")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each case")
    parser.add_argument("--save", help="writes RESULTS/SAVE.json; gpu_models unless --tiny")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder")
    arguments = parser.parse_args(argv)
    if arguments.save is None and not arguments.tiny:
        arguments.save = "gpu_models"
    return arguments


@torch.no_grad()
def measure(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each candidate and mode: all are checked first, then timed in turn."""
    model, x = built(case.kind, case.sizes, case.tokens, arguments.device)
    expected = model(x).float()
    rows: list[dict[str, Any]] = []
    ready: dict[int, Callable[[], object]] = {}
    models = variants(model, x)
    torch.compiler.reset()  # Dynamo stops after eight recompilations of one forward
    for mode in ("eager", "graph", "compiled"):
        if (mode == "graph" and arguments.device == "cpu") or (mode == "compiled" and not arguments.compile):
            continue
        for name, variant in models.items():
            if mode == "compiled" and name not in COMPILED:
                continue
            row: dict[str, Any] = {"name": name, "mode": mode}
            rows.append(row)
            if isinstance(variant, str):
                row["note"] = variant
                continue
            try:
                call = called(variant, x, mode)
                row |= checked(call, expected)
                row["runs"] = kernels(variant)
                if row["error"] <= ALLOWED_ERROR:
                    ready[len(rows) - 1] = call
            except Exception as failure:  # a candidate may fail in any way; the others are still measured
                row["note"] = shortly(failure)
    clock = wall_seconds if arguments.device == "cpu" else card_seconds
    for index, seconds in paired_seconds(ready, seconds=arguments.seconds, clock=clock).items():
        rows[index]["ms"] = seconds * 1e3
    return with_ratios(rows)


def tiny(case: Case) -> Case:
    sizes = replace(TINY, cached=case.sizes.cached // SHRUNK)
    return replace(case, sizes=sizes, tokens=max(1, case.tokens // SHRUNK))


def variants(model: nn.Module, x: torch.Tensor) -> dict[str, nn.Module | str]:
    """The same model in every available variant, by name, or why it is not available; auto's engine is not repeated."""
    auto = patched(model, "auto")
    found: dict[str, nn.Module | str] = {"bf16": model, "fp8gemm auto": auto}
    chosen = set()
    if not isinstance(auto, str):
        auto(x)  # a copy chooses its engines at the first call
        chosen = {row.engine for row in report(auto).converted}
    for engine in order(probe(x.device)):
        if chosen != {engine}:
            found[f"fp8gemm {engine}"] = patched(model, engine)
    fused = patched(model, "auto")
    if not isinstance(fused, str) and not fuse_siblings(fused).groups:
        fused = "no siblings that could be joined"
    found["fp8gemm auto, fused"] = fused
    try:
        found["torchao"] = with_torchao(copy.deepcopy(model))
    except Exception as failure:  # torchao rejects machines by assertions
        found["torchao"] = shortly(failure)
    return found


def patched(model: nn.Module, engine: str) -> nn.Module | str:
    """A copy of ``model`` on FP8 weights, or why this engine cannot run it."""
    options = FP8GemmOptions(engine=engine)
    try:
        return enable_fp8_gemm(model, options=options, inplace=False)
    except UnsupportedError as error:
        return str(error).splitlines()[-1].strip()


def called(model: nn.Module, x: torch.Tensor, mode: str) -> Callable[[], torch.Tensor]:
    """A forward call; siblings are fused from the second call on, so a graph must not capture the first."""
    if mode == "compiled":
        model = torch.compile(model)
    call = partial(model, x)
    for _ in range(3):
        call()
    return captured(call) if mode == "graph" else call


def checked(call: Callable[[], torch.Tensor], expected: torch.Tensor) -> dict[str, Any]:
    error = ((call().float() - expected).norm() / expected.norm()).item()
    return {"error": error, **({} if error <= ALLOWED_ERROR else {"note": "wrong, and so not timed"})}


def kernels(model: nn.Module) -> str:
    """The fp8gemm kernels that really ran."""
    return ", ".join(sorted({name for row in report(model).converted for name, _ in row.kernels}))


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one case, with each speedup over bfloat16 in the same mode."""
    baselines = {row["mode"]: row["ms"] for row in rows if row["name"] == "bf16" and "ms" in row}
    for row in rows:
        if "ms" in row and row["mode"] in baselines:
            row["x bf16"] = baselines[row["mode"]] / row["ms"]
    return rows


if __name__ == "__main__":
    main()
