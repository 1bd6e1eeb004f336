"""FP8 products on a CUDA card: bfloat16, every engine and every peer that is there, in one process.

    python benchmarks/gpu.py [--kinds row,block,grouped] [--models llama-8b,...] [--tokens 1,16,...] [--save gpu]

Each row of the result is one product with its activations' quantization: microseconds in a CUDA graph, where only the
card counts, and of host time in eager. A candidate is checked against the float32 product of the dequantized operands
before it is timed, and left out with its error if it is wrong or fails. Weights rotate through more memory than the L2
cache holds; data are random, as zeros run faster. Peers come from .peers/peers.py if that folder is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from harness import RESULTS, save, table

from fp8gemm import ENGINES, SCHEMES, MatmulSpec, ScaledTensor, UnsupportedError, choose, dequantize, probe
from fp8gemm.quantize import quantize_weight

PEERS = Path(__file__).parent.parent / ".peers" / "peers.py"
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
KINDS = ("row", "block", "grouped")
# Layers as N x K; of experts as E x N x K.
MODELS: dict[str, dict[str, tuple[int, ...]]] = {
    "llama-8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "lm_head": (128256, 4096),
    },
    "llama-70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
    "deepseek-v3": {
        "q_a+kv_a": (2112, 7168),
        "q_b": (24576, 1536),
        "kv_b": (32768, 512),
        "o": (7168, 16384),
        "dense gate_up": (36864, 7168),
        "dense down": (7168, 18432),
        "experts gate_up": (256, 4096, 7168),
        "experts down": (256, 7168, 2048),
    },
    "mixtral": {"experts gate_up": (8, 28672, 4096), "experts down": (8, 4096, 14336)},
    "flux": {
        "qkv": (9216, 3072),
        "proj": (3072, 3072),
        "mlp up": (12288, 3072),
        "mlp down": (3072, 12288),
        "proj_out": (3072, 15360),
    },
    "wan-14b": {"qkv": (5120, 5120), "ffn up": (13824, 5120), "ffn down": (5120, 13824)},
}
# Of an H200: copying memory, and matrix products of bfloat16 as measured; FP8's at the same fraction of nominal.
BYTES_PER_SECOND, BF16_FLOPS, FP8_FLOPS = 4.3e12, 790e12, 1580e12
# Relative, against activations as they are: e4m3 rounds those by up to 2**-4.
ALLOWED_ERROR = 5e-2
ROTATION_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One product: ``experts`` is 0 for a single weight."""

    kind: str
    model: str
    layer: str
    n: int
    k: int
    m: int
    experts: int = 0

    @property
    def floors(self) -> dict[str, float]:
        """Microseconds that memory and arithmetic of an H200 take at least, in bfloat16 and in FP8."""
        m, n, k = self.m, self.n, self.k
        weights = n * k * max(1, min(self.experts, m))
        bf16 = max(2 * m * n * k / BF16_FLOPS, 2 * (m * k + weights + m * n) / BYTES_PER_SECOND)
        fp8 = max(2 * m * n * k / FP8_FLOPS, (m * k + weights + 2 * m * n + 4 * (m + n)) / BYTES_PER_SECOND)
        return {"bf16 floor us": bf16 * 1e6, "fp8 floor us": fp8 * 1e6}


def main() -> None:
    arguments = parse()
    wanted = list(cases(arguments.kinds, arguments.models, arguments.tokens))
    if not torch.cuda.is_available():
        raise SystemExit(f"{len(wanted)} cases, but no CUDA card: python benchmarks/linear.py measures CPUs")
    peers, notes = load_peers(PEERS)
    rows = []
    for case in wanted:
        measured = measure(case, peers, arguments.repeats)
        rows += measured
        print(table(measured, ["layer", "n", "k", "m", "name", "graph us", "host us", "x bf16", "error", "note"]))
    print(save(arguments.save, rows, **card_facts(), peers=notes))
    print(*plot(rows, arguments.save), sep="\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    def listed(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            wrong = [name for name in text.split(",") if name not in allowed]
            if wrong:
                raise argparse.ArgumentTypeError(f"one of {', '.join(allowed)}, found {', '.join(wrong)}")
            return text.split(",")

        return split

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", type=listed(KINDS), default=list(KINDS))
    parser.add_argument("--models", type=listed(tuple(MODELS)), default=list(MODELS))
    parser.add_argument("--tokens", type=lambda text: [int(m) for m in text.split(",")], default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=20, help="of each timing, whose median counts")
    parser.add_argument("--save", default="gpu", help="writes benchmarks/results/SAVE.json and plots")
    return parser.parse_args(argv)


def cases(kinds: list[str], models: list[str], tokens: list[int]) -> Iterator[Case]:
    """Every layer once for each kind that it fits and each M; shapes that two models share only once."""
    seen = set()
    for kind, model in itertools.product(kinds, models):
        for layer, shape in MODELS[model].items():
            if (len(shape) == 3) != (kind == "grouped") or (kind, shape) in seen:
                continue
            seen.add((kind, shape))
            *experts, n, k = shape
            for m in tokens:
                yield Case(kind=kind, model=model, layer=layer, n=n, k=k, m=m, experts=experts[0] if experts else 0)


def load_peers(path: Path) -> tuple[ModuleType | None, dict[str, str]]:
    """The module that knows the peers, and which of them are there or why not."""
    if not path.is_file():
        return None, {"peers": f"no {path.parent.name} folder"}
    spec = importlib.util.spec_from_file_location("peers", path)
    assert spec is not None
    assert spec.loader is not None
    peers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peers)
    loaded, errors = peers.load()
    return peers, {**dict.fromkeys(loaded, "loaded"), **errors}


def card_facts() -> dict[str, Any]:
    """The card and what drives it; ``harness.facts`` adds the date and the rest."""
    machine = probe("cuda")
    triton = None if machine.triton_version is None else ".".join(map(str, machine.triton_version))
    return {"card": machine.name, "capability": machine.capability, "cuda": torch.version.cuda, "triton": triton}


class Operands:
    """Random tokens, a weight many times over in bfloat16 and in FP8, and the float32 product to check against."""

    def __init__(self, case: Case) -> None:
        self.case = case
        scheme = SCHEMES["block" if case.kind == "block" else "row"]
        shape = (case.experts, case.n, case.k) if case.experts else (case.n, case.k)
        dense = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * case.k**-0.5
        self.x = torch.randn(case.m, case.k, device="cuda", dtype=torch.bfloat16)
        self.scheme = scheme
        self.weight = _quantized(dense, scheme.weight)
        self.dense = dense
        self.copies = max(1, min(8, ROTATION_BYTES // self.weight.data.nbytes))
        self.ends = None
        if case.experts:
            expert = torch.randint(case.experts, (case.m,), device="cuda").sort().values
            self.ends = torch.searchsorted(expert, torch.arange(1, case.experts + 1, device="cuda")).to(torch.int32)

    def expected(self) -> torch.Tensor:
        if self.ends is None:
            return self.x.float() @ dequantize(self.weight).t()
        y = torch.zeros(self.case.m, self.case.n, device="cuda")
        start = 0
        for expert, end in enumerate(self.ends.tolist()):
            if end > start:
                one = ScaledTensor(self.weight.data[expert], self.weight.scale[expert], self.weight.granularity)
                y[start:end] = self.x[start:end].float() @ dequantize(one).t()
            start = end
        return y

    def fp8_copies(self) -> list[ScaledTensor]:
        clone = lambda: ScaledTensor(self.weight.data.clone(), self.weight.scale.clone(), self.weight.granularity)  # noqa: E731
        return [clone() for _ in range(self.copies)]


def _quantized(dense: torch.Tensor, granularity: Any) -> ScaledTensor:
    if dense.dim() == 2:
        return quantize_weight(dense, granularity)
    parts = [quantize_weight(one, granularity) for one in dense]
    return ScaledTensor(
        torch.stack([one.data for one in parts]), torch.stack([one.scale for one in parts]), granularity
    )


def candidates(operands: Operands, peers: ModuleType | None) -> dict[str, list[Callable[[], torch.Tensor]] | str]:
    """By name, the same product once for each copy of the weight; or why there is none."""
    found: dict[str, list[Callable[[], torch.Tensor]] | str] = {"bf16": _bf16(operands)}
    case, machine = operands.case, probe("cuda")
    spec = MatmulSpec(scheme=operands.scheme, n=case.n, k=case.k, experts=case.experts)
    for name, engine in ENGINES.items():
        if name in ("reference", "cpu"):
            continue
        reasons = engine.rejects(spec, machine)
        found[f"fp8gemm {name}"] = "; ".join(reasons) if reasons else _engine(operands, name)
    try:
        found["fp8gemm auto"] = f"is {choose(spec, machine).winner}"
    except UnsupportedError as error:
        found["fp8gemm auto"] = str(error)
    if peers is not None:
        found |= _peers(operands, peers)
    return found


def _bf16(operands: Operands) -> list[Callable[[], torch.Tensor]]:
    x, ends = operands.x, operands.ends
    copies = [operands.dense.clone() for _ in range(operands.copies)]
    if ends is None:
        return [lambda w=w: F.linear(x, w) for w in copies]
    return [lambda w=w: F.grouped_mm(x, w.transpose(-2, -1), offs=ends) for w in copies]


def _engine(operands: Operands, name: str) -> list[Callable[[], torch.Tensor]]:
    engine, x, ends = ENGINES[name], operands.x, operands.ends
    if ends is None:
        prepared = [engine.prepare(copy, operands.scheme) for copy in operands.fp8_copies()]
        return [lambda w=w: engine.linear(x, w, None, torch.bfloat16) for w in prepared]
    stacks = [engine.prepare_stack(copy, operands.scheme) for copy in operands.fp8_copies()]
    return [lambda w=w: engine.grouped(x, w, ends, None, torch.bfloat16) for w in stacks]


def _peers(operands: Operands, peers: ModuleType) -> dict[str, list[Callable[[], torch.Tensor]] | str]:
    """Peers' products after the first quantization that is there; theirs where a peer has its own."""
    kind, x = operands.case.kind, operands.x
    copies = operands.fp8_copies()
    if kind == "block":
        from fp8gemm.engines.triton_kernels import quantize as kernels

        return {
            name: [lambda w=w, f=f: f(*_swap(kernels.quantize_groups(x), w)) for w in copies]
            for name, f in peers.blockwise(torch).items()
        }
    quantizers = peers.rowquant(torch)
    products = peers.grouped(torch) if kind == "grouped" else peers.rowwise(torch)
    found: dict[str, list[Callable[[], torch.Tensor]] | str] = {}
    for name, f in products.items():
        own = next((q for q in quantizers if q.split("_")[0] == name.split("_")[0]), next(iter(quantizers), None))
        if own is None:
            found[name] = "no quantization kernel of a peer is there"
            continue
        rounds = quantizers[own]
        more = () if operands.ends is None else (operands.ends,)
        found[f"{name} + {own}"] = [lambda w=w, f=f, q=rounds, e=more: f(*_swap(q(x), w), *e) for w in copies]
    return found


def _swap(xq: tuple[torch.Tensor, torch.Tensor], weight: ScaledTensor) -> tuple[torch.Tensor, ...]:
    """Operands in the order that peers.py takes them."""
    scale = xq[1] if xq[1].dim() == 2 else xq[1].view(-1, 1)
    return xq[0], weight.data, scale, weight.scale


def measure(case: Case, peers: ModuleType | None, repeats: int) -> list[dict[str, Any]]:
    """A row for each candidate: checked first, then timed in a graph and in eager."""
    operands = Operands(case)
    expected = operands.expected()
    rows: list[dict[str, Any]] = []
    for name, calls in candidates(operands, peers).items():
        row = {**vars(case), "name": name, **case.floors}
        if isinstance(calls, str):
            rows.append({**row, "note": calls})
            continue
        try:
            error = ((calls[0]().float() - expected).norm() / expected.norm()).item()
            if not error <= ALLOWED_ERROR:
                rows.append({**row, "error": error, "note": "wrong, and so not timed"})
                continue
            times = {"graph us": graph_microseconds(calls, repeats), "host us": host_microseconds(calls, repeats)}
            rows.append({**row, "error": error, **times})
        except Exception as failure:  # a peer may fail in any way; the others are still to be measured
            rows.append({**row, "note": f"{type(failure).__name__}: {str(failure)[:200]}"})
    return with_ratios(rows)


def graph_microseconds(calls: list[Callable[[], torch.Tensor]], repeats: int) -> float:
    """Median microseconds of a call inside a CUDA graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, 16 // len(calls))
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(rounds) for call in calls]
    samples = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / len(kept))
    return statistics.median(samples[3:])


def host_microseconds(calls: list[Callable[[], torch.Tensor]], repeats: int) -> float:
    """Median microseconds until a call has returned to Python, with an empty queue before it."""
    samples = []
    for call in itertools.islice(itertools.cycle(calls), repeats + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples[3:])


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with how many times faster than bfloat16 each is and its TFLOP/s."""
    baseline = next((row["graph us"] for row in rows if row["name"] == "bf16" and "graph us" in row), None)
    for row in rows:
        if "graph us" in row:
            row["TFLOP/s"] = 2 * row["m"] * row["n"] * row["k"] / row["graph us"] / 1e6
            if baseline is not None:
                row["x bf16"] = baseline / row["graph us"]
    return rows


def plot(rows: list[dict[str, Any]], name: str, directory: Path = RESULTS) -> list[Path]:
    """A picture for each layer, speed-up over M and the most that an H200 allows; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for (kind, n, k), group in _by_layer(rows).items():
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        tokens = sorted({row["m"] for row in group})
        for candidate in sorted({row["name"] for row in group if "x bf16" in row}):
            points = sorted((row["m"], row["x bf16"]) for row in group if row["name"] == candidate and "x bf16" in row)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=candidate)
        bound = {row["m"]: row["bf16 floor us"] / row["fp8 floor us"] for row in group}
        axes.plot(tokens, [bound[m] for m in tokens], "k--", linewidth=1, label="floor over floor")
        axes.set(xscale="log", xlabel="M", ylabel="times faster than bfloat16", title=f"{kind} {n} x {k}")
        axes.legend(fontsize=6)
        path = directory / f"{name}_{kind}_{n}x{k}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        written.append(path)
    return written


def _by_layer(rows: list[dict[str, Any]]) -> Mapping[tuple[str, int, int], list[dict[str, Any]]]:
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["kind"], row["n"], row["k"]), []).append(row)
    return found


if __name__ == "__main__":
    main()
