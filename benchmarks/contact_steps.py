"""The rows of each step of benchmarks/first_contact.py, as functions that measure one when they are called."""

from __future__ import annotations

import datetime
import itertools
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from types import ModuleType

import gpu
import gpu_models
import torch
import torch.nn.functional as F
from card import PEERS, card_here, load_peers
from contact_journal import Found, Refused, Rows, Work
from contact_probes import engines_of, probes
from contact_tests import tests
from gpu_candidates import Operands
from gpu_cases import Case, cases
from torch import nn

from fp8gemm import (
    ENGINES,
    MX,
    SCHEMES,
    TENSOR,
    FP8GemmOptions,
    FP8Linear,
    MatmulSpec,
    ScaledTensor,
    Scheme,
    doctor,
    probe,
)
from fp8gemm.bench import tune
from fp8gemm.bench.contest import Entrant, Expectation, Weights, contest, dense_entrant, entrant_of, watch_of
from fp8gemm.bench.place import device_of
from fp8gemm.bench.place import versions as versions_here
from fp8gemm.engines import Engine, prepare
from fp8gemm.engines.triton import table as tables
from fp8gemm.engines.triton.engine import TritonEngine
from fp8gemm.engines.triton.plan import Kind, Plan, bucket
from fp8gemm.engines.triton.tune import Cell, candidates, describe, held
from fp8gemm.weights.operation import call_linear
from fp8gemm.weights.quantization import quantize_weight

BF16 = torch.bfloat16
ASKED: dict[str, Scheme] = {
    "row": SCHEMES["row"],
    "tensor": SCHEMES["tensor"],
    "static tensor": Scheme(weight=TENSOR, activation=TENSOR, static=True),
    "block": SCHEMES["block"],
    "weight_only": SCHEMES["weight_only"],
    "mx": Scheme(weight=MX, activation=None, scale_format="ue8m0"),
}
TOKENS = (1, 96, 16, 256, 64)  # those of different kernels first
N, K = 512, 1024
LAYERS = ("o", "gate_up", "down", "qkv", "lm_head")  # of Llama-8B, those that tell most first
TABLE_TOKENS = (1, 64, 4096, 16, 256, 1024, 4, 128, 512)
EXPERT_TOKENS = (64, 1024, 8192)
SHAPES = ((4096, 4096), (28672, 4096))
# Products at both sides of the numbers of tokens where the formula changes its path.
SWITCHES: dict[Kind, tuple[int, ...]] = {
    "row": (1, 4, 32, 64, 128, 256),
    "block": (64, 256, 512, 1024),
    "weight": (256, 512),
}
# Compiling what Inductor makes of torchao takes longer than all that is measured of it here.
SKIPPED = ["torchao compiled"]
PACKAGES = ("vllm", "deep_gemm", "torchao", "transformers", "numpy", "pytest", "pytest-timeout", "fbgemm-gpu-genai")


def place(device: str) -> Found:
    """The card and the versions that every figure needs."""
    named = asdict(card_here()) if device == "cuda" else {"card": f"none: {platform.processor() or device}"}
    today = datetime.date.today().isoformat()
    return {**named, **versions_here(), "python": platform.python_version(), "date": today}


def versions(work: Work) -> Rows:
    return {
        "versions": lambda: {"place": place(work.device), "packages": packages()},
        "driver": lambda: {"text": said("nvidia-smi")},
        "compiler": lambda: {"text": said("nvcc", "--version")},
        "doctor": lambda: {"text": str(doctor.examine())},
        "peers": lambda: {"peers": load_peers(PEERS)[1]},
    }


def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def said(*command: str) -> str:
    """What a command prints."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except FileNotFoundError as missing:
        raise Refused(f"there is no {command[0]}") from missing


def checks(work: Work) -> Rows:
    return {
        f"{engine} {name}": partial(checked, engine, scheme, work.device)
        for name, scheme in ASKED.items()
        for engine in engines_of(work.device)
    }


def checked(engine: str, scheme: Scheme, device: str) -> Found:
    """Packs a weight, before which an engine checks itself on the card, once in a process and kernel.

    Raises:
        Refused: the engine does not take the scheme on this machine.
        UnsupportedError: it does, but its check found it to be wrong here.
    """
    machine, spec = probe(device), MatmulSpec(scheme=scheme, n=N, k=K)
    if reasons := ENGINES[engine].rejects(spec, machine):
        raise Refused("; ".join(reasons))
    weight, _, _ = exact(scheme, 1, device)
    packed = prepare(weight, spec, machine, engine, input_scale=static_scale(scheme, device))
    return {"kernels": {m: ENGINES[engine].kernel(m, packed, BF16) for m in sorted(TOKENS)}}


def static_scale(scheme: Scheme, device: str) -> torch.Tensor | None:
    return torch.ones(1, device=device) if scheme.static else None


def exact(scheme: Scheme, m: int, device: str) -> tuple[ScaledTensor, torch.Tensor, torch.Tensor]:
    """A weight, tokens and their product in bfloat16, which is the same in any order of summation.

    All are small integers times powers of two. A 448 in each group of tokens, which meets a zero, makes its scale 1.
    """
    generator = torch.Generator().manual_seed(m)
    data = torch.randint(-1, 2, (N, K), generator=generator).float()
    x = torch.randint(-1, 2, (m, K), generator=generator).to(BF16)
    data[:, ::32], x[:, ::32] = 0, 448
    shape = scheme.weight.scale_shape(data.shape)
    scale = 2.0 ** torch.randint(-1, 2, shape, generator=generator).float()
    rows, cols = scheme.weight.block(data.shape)
    wide = scale.double().repeat_interleave(rows, 0)[:N].repeat_interleave(cols, 1)[:, :K]
    y = (x.double() @ (data.double() * wide).t()).to(BF16)
    weight = ScaledTensor(data.to(torch.float8_e4m3fn), scale, scheme.weight)
    return weight.to(device), x.to(device), y.to(device)


def products(work: Work) -> Rows:
    """Each engine as it runs, then each path of the Triton engine that it does not choose for so many tokens."""
    rows: dict[str, Callable[[], Found]] = {}
    for engine, m, (name, scheme) in itertools.product(engines_of(work.device), TOKENS, ASKED.items()):
        rows[f"{engine} {name} M={m}"] = partial(product, ENGINES[engine], scheme, m, work.device)
        for plan in other_paths(TritonEngine(), scheme, m, work.device) if engine == "triton" else ():
            forced = held(TritonEngine(), plan)
            rows[f"triton {plan.path} {name} M={m}"] = partial(product, forced, scheme, m, work.device)
    return rows


def product(engine: Engine, scheme: Scheme, m: int, device: str) -> Found:
    """One exact product.

    Raises:
        Refused: the engine does not take the scheme on this machine.
        ArithmeticError: the product is wrong.
    """
    if reasons := engine.rejects(MatmulSpec(scheme=scheme, n=N, k=K), probe(device)):
        raise Refused("; ".join(reasons))
    weight, x, expected = exact(scheme, m, device)
    packed = engine.prepare(weight, scheme, input_scale=static_scale(scheme, device))
    y = engine.linear(x, packed, None, BF16)
    wrong = (y != expected).nonzero().tolist()
    if wrong:
        row, column = wrong[0]
        raise ArithmeticError(
            f"{len(wrong)} of {y.numel()} outputs are wrong by {engine.kernel(m, packed, BF16)}, the first is "
            f"y[{row}, {column}] = {y[row, column].item()} for {expected[row, column].item()}"
        )
    return {"kernel": engine.kernel(m, packed, BF16)}


def other_paths(engine: TritonEngine, scheme: Scheme, m: int, device: str) -> list[Plan]:
    """A plan for each path of the Triton engine that can run this, but the one that it chooses."""
    where = engine.place(device_of(device))
    kind = tables.kind_for(scheme, torch.float8_e4m3fn, native=where.native)
    if kind == "weight_k":  # which has one path
        return []
    return first_of_each_path(candidates(where, Cell(kind=kind, n=N, k=K, m=bucket(m))))[1:]


def first_of_each_path(plans: Iterable[Plan]) -> list[Plan]:
    found: dict[str, Plan] = {}
    for plan in plans:
        found.setdefault(plan.path, plan)
    return list(found.values())


def table(work: Work) -> Rows:
    """Products in the order that tells most: each layer at few, medium and many tokens first."""
    found = cases(["row", "block"], ["llama-8b"], list(TABLE_TOKENS))
    ranked = sorted(found, key=lambda case: (TABLE_TOKENS.index(case.m) // 3, LAYERS.index(case.layer)))
    return measured(ranked, work)


def grouped(work: Work) -> Rows:
    return measured(list(cases(["grouped"], ["mixtral", "deepseek-v3"], list(EXPERT_TOKENS))), work)


def measured(wanted: list[Case], work: Work) -> Rows:
    """Rows of benchmarks/gpu.py: without peers once a row died, as one of them may kill or delay every product."""

    def row(case: Case) -> Found:
        return {"measured": gpu.measure(Operands(case), None if work.died else peers(), 20, SKIPPED)}

    return {f"{case.kind} {case.layer} {case.n}x{case.k} M={case.m}": partial(row, case) for case in wanted}


@cache
def peers() -> ModuleType | None:
    return load_peers(PEERS)[0]


def variants(work: Work) -> Rows:
    """The first plan of each path around the formula's changes of path, all plans for few tokens, and host times."""
    rows: dict[str, Callable[[], Found]] = {}
    for (n, k), m in itertools.product(SHAPES, (1, 16, 64)):
        rows[f"host {n}x{k} M={m}"] = partial(host, n, k, m, work.device)
    for (n, k), (kind, tokens) in itertools.product(SHAPES, SWITCHES.items()):
        for m in tokens:
            cell = Cell(kind=kind, n=n, k=k, m=m)
            rows[f"paths {kind} {n}x{k} M={m}"] = partial(plans_timed, TritonEngine(), cell, work.device)
    for m, kind, (n, k) in itertools.product((1, 16), ("row", "block"), SHAPES):
        cell = Cell(kind=kind, n=n, k=k, m=m)
        rows[f"plans {kind} {n}x{k} M={m}"] = partial(plans_timed, TritonEngine(), cell, work.device, every=True)
    return rows


@torch.no_grad()
def plans_timed(engine: TritonEngine, cell: Cell, device: str, *, every: bool = False) -> Found:
    """Microseconds of plans for one product, the formula's first, beside bfloat16: the first of each path, or all."""
    place = device_of(device)
    weights = Weights(cell.n, cell.k, cell.scheme, place)
    copies, expectation = weights.packed(engine), Expectation(weights.tokens(cell.m), weights)
    plans = candidates(engine.place(place), cell, fast=copies[0].fast)
    entrants: dict[Plan | None, Entrant] = {
        plan: entrant_of(held(engine, plan), copies, expectation)
        for plan in (plans if every else first_of_each_path(plans))
    }
    entrants[None] = dense_entrant(weights.dense(), expectation)
    timed = [
        {
            "plan": "bf16" if plan is None else describe(plan),
            "path": "bf16" if plan is None else plan.path,
            "us": None if result.seconds is None else result.seconds * 1e6,
            "note": result.note,
        }
        for plan, result in contest(entrants, watch_of(place), seconds=1.0).items()
    ]
    return {**asdict(cell), "formula": describe(plans[0]), "plans": timed}


@torch.no_grad()
def host(n: int, k: int, m: int, device: str) -> Found:
    """Microseconds until a call returns to Python: of bfloat16, of a layer's bound call, of the operation that stands
    in compiled graphs, and of a small operation of torch to compare with."""
    linear = nn.Linear(k, n, bias=False, device=device, dtype=BF16).requires_grad_(False)
    layer = FP8Linear.from_linear(linear, FP8GemmOptions())
    x = torch.randn(m, k, device=device, dtype=BF16)
    weight, scheme = quantize_weight(linear.weight, SCHEMES["row"].weight), SCHEMES["row"]
    packed = prepare(weight, MatmulSpec(scheme=scheme, n=n, k=k), probe(device))
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "F.linear": lambda: F.linear(x, linear.weight),
        "bound call": lambda: layer(x),
        "operation": lambda: call_linear(x, packed, None, BF16),
        "x.neg()": lambda: x.neg(),
    }
    return {"engine": packed.engine, "us": {name: gpu.host_microseconds([call], 100) for name, call in calls.items()}}


def models(work: Work) -> Rows:
    return {name: partial(model, name, work.device) for name in gpu_models.CASES}


def model(name: str, device: str, *more: str) -> Found:
    load_peers(PEERS, "torchao")
    arguments = gpu_models.parse(["--cases", name, "--seconds", "3", "--device", device, *more])
    case = gpu_models.tiny(gpu_models.CASES[name]) if arguments.tiny else gpu_models.CASES[name]
    rows = gpu_models.measure(case, arguments)
    return {"measured": [{"case": name, "tokens": case.tokens, **row} for row in rows]}


def tuning(work: Work) -> Rows:
    return {kind: partial(tuned, kind, work.device) for kind in ("row", "block")}


def tuned(kind: Kind, device: str) -> Found:
    """A tuning of one shape, into a folder of its own, so that what runs later is not changed by it."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FP8GEMM_CACHE"] = folder
        found = tune([SHAPES[0]], tokens=[16, 256], kinds=[kind], device=device, seconds=0.5).to_dict()
        return {**found, "table": Path(found["table"]).read_text()}


STEPS: dict[str, Callable[[Work], Rows]] = {
    "versions": versions,
    "checks": checks,
    "products": products,
    "sanitized": products,
    "tests": tests,
    "probes": probes,
    "table": table,
    "variants": variants,
    "grouped": grouped,
    "models": models,
    "tune": tuning,
}
