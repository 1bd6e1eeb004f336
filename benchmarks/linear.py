"""One Linear on a CPU: ``F.linear`` in the model's dtype, our engines and other libraries, paired; medians.

    python benchmarks/linear.py [--shapes 4096x4096,...] [--tokens 1,16,...] [--dtypes bfloat16,float32]
        [--schemes row,block] [--threads 1,2] [--isa avx512,avx2] [--peers [NAME,...]] [--save NAME]

Everything is checked before it is timed. Weights come from memory, as in a real model: each call multiplies the next of
many copies of the layer. ``--cold 0`` has one layer, which stays in the caches. ``--isa`` measures each instruction set
in a process of its own, with torch, oneDNN, MKL and FBGEMM held down together with fp8gemm. ``--save`` adds the run to
those of the file; ``benchmarks/goals.py`` and ``benchmarks/plot.py`` read it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import isa
import torch
from harness import add_run, busy_cores, host, last_level_cache, listed, paired_seconds, table
from peers import INT8_TOLERANCE, PEERS, Absent, Peer, make, quiet, versions

from fp8gemm import ENGINES, GROUP_128, MX, SCHEMES, ScaledTensor, Scheme, native, probe, quantize
from fp8gemm.bench.contest import (
    Calls,
    Entrant,
    Expectation,
    Result,
    Weights,
    contest,
    dense_entrant,
    entrant_of,
    watch_processor,
)
from fp8gemm.bench.engines import pack
from fp8gemm.engines import PackedWeight

CPU = torch.device("cpu")
# MiniLM's and BERT's layers, a square one, Llama's.
SHAPES = "384x384,1536x384,384x1536,1024x1024,4096x4096,11008x4096,4096x14336"
TOKENS = "1,2,4,8,16,32,64,128,256,512,1024"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GRANULARITIES = {
    **SCHEMES,
    "group": Scheme(weight=GROUP_128, activation=None),
    "mx": Scheme(weight=MX, activation=None, scale_format="ue8m0"),
}
QUIET = 0.1  # cores that others keep busy, above which figures cannot be relied on
SAMPLE = 1e-2  # seconds: shorter calls are timed several at once, so that little depends on what ran before
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    runs = [in_own_process(argv, level) for level in arguments.isa] or [measured(arguments)]
    if arguments.into:
        Path(arguments.into).write_text(json.dumps(runs[0]))
    elif arguments.save:
        for run in runs:
            print(add_run(arguments.save, run))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shapes, default=SHAPES, help="N x K")
    parser.add_argument("--tokens", type=counts, default=TOKENS)
    parser.add_argument("--dtypes", type=listed(DTYPES), default="bfloat16,float32")
    parser.add_argument("--schemes", type=listed(GRANULARITIES), default="row,block")
    parser.add_argument("--threads", type=counts, default=str(torch.get_num_threads()))
    parser.add_argument("--engines", type=listed(ENGINES), default="cpu")
    parser.add_argument(
        "--peers", type=listed(PEERS), nargs="?", default=[], const=list(PEERS), help=f"of {', '.join(PEERS)}; or all"
    )
    parser.add_argument("--isa", type=levels, default="", help="held down to each of amx, avx512_bf16, avx512, avx2")
    parser.add_argument("--cold", type=int, help="MB of FP8 weights to rotate through; twice the cache, at least 100")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each shape, M, dtype and thread count")
    parser.add_argument("--longest", type=float, default=0.5, help="seconds of a peer's call above which it is absent")
    parser.add_argument("--quantizer", action="store_true", help="also time the quantization of each weight")
    parser.add_argument("--save", help="add the run to benchmarks/results/SAVE.json")
    parser.add_argument("--into", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.cold is None:
        arguments.cold = max(100, 2 * last_level_cache() // 10**6)
    return arguments


def counts(text: str) -> list[int]:
    """An argument type: ascending positive numbers."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise argparse.ArgumentTypeError(f"numbers of at least 1 such as 1,16, found {text}")
    return found


def shapes(text: str) -> list[tuple[int, int]]:
    """An argument type: shapes (N, K)."""
    parts = [part.split("x") for part in text.split(",")]
    if not all(len(part) == 2 and all(side.isdigit() and int(side) for side in part) for part in parts):
        raise argparse.ArgumentTypeError(f"shapes N x K such as 384x384,4096x4096, found {text}")
    return [(int(n), int(k)) for n, k in parts]


def levels(text: str) -> list[str]:
    """An argument type: instruction sets that this processor has."""
    asked, here = [part for part in text.split(",") if part], isa.available()
    if wrong := [name for name in asked if name not in here]:
        raise argparse.ArgumentTypeError(f"this processor has {', '.join(here) or 'none'}, not {', '.join(wrong)}")
    return asked


def in_own_process(argv: list[str], level: str) -> Row:
    """The run of these arguments in a new process, held down to ``level``."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "run.json"
        # Inductor's cache does not know for which instruction set its code was made.
        environment = isa.held_down(level) | {"TORCHINDUCTOR_CACHE_DIR": folder}
        command = [sys.executable, __file__, *argv, "--isa", "", "--into", str(into)]
        subprocess.run(command, env=environment, check=True)
        run: Row = json.loads(into.read_text())
    if run["isa"] != level:
        raise SystemExit(f"held down to {level}, but fp8gemm's kernels used {run['isa']}")
    return run


@torch.no_grad()
def measured(arguments: argparse.Namespace) -> Row:
    """A run: the machine, the settings, and a row for each product and what multiplies it."""
    about = {name: value for name, value in asdict(host()).items() if name != "threads"}
    run = {**about, "isa": isa.in_effect(), "held_down": isa.limits(), "peers": versions()}
    run |= {"cold_megabytes": arguments.cold, "seconds": arguments.seconds, "longest": arguments.longest}
    run["busy_cores"] = busy_cores()
    print(f"{host()}; {run['isa']}, {arguments.cold} MB of cold weights", flush=True)
    if run["busy_cores"] and run["busy_cores"] > QUIET:
        print(f"other processes keep {run['busy_cores']:.2f} cores busy: not a quiet machine", flush=True)
    rows: list[Row] = []
    quantizing: list[Row] = []
    for dtype, (n, k) in itertools.product(arguments.dtypes, arguments.shapes):
        layers = Layers(
            n, k, arguments.schemes, dtype, engines=arguments.engines, peers=arguments.peers, cold=arguments.cold
        )
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            found = list(layers.rows(arguments.tokens, threads, arguments.seconds, arguments.longest))
            for scheme in arguments.schemes:
                print(report([row for row in found if row["scheme"] == scheme]), flush=True)
            rows += found
            if arguments.quantizer:
                quantizing += layers.quantizers(threads, arguments.seconds)
    if quantizing:
        print("quantizer, milliseconds:", table(quantizing, list(quantizing[0])), sep="\n", flush=True)
    return run | {"rows": rows, "quantizer": quantizing}


class OverBudget(Exception):
    """A call takes longer than the budget."""


def watch(calls: Calls, *, longest: float, exempt: Sequence[Calls]) -> Callable[[], float]:
    """As ``watch_processor``; raises if a call that is not exempt takes longer than ``longest`` seconds."""
    if not any(calls is other for other in exempt):
        start = time.perf_counter()
        calls[-1]()  # the first of all was the one that was checked
        if (took := time.perf_counter() - start) > longest:
            raise OverBudget(f"one call takes {took:.2f} s, more than {longest} s")
    return watch_processor(calls, least=SAMPLE)


@dataclass(frozen=True)
class _Quantizer:
    """Both quantizers of a weight ``w``: torch's operations, and the compiled kernel if there is one."""

    w: torch.Tensor
    scheme: Scheme

    def torch(self) -> ScaledTensor:
        return quantize(self.w, self.scheme.weight, scale_format=self.scheme.scale_format)

    def native(self, library: native.Library) -> None:
        granularity, shape = self.scheme.weight, self.w.shape
        data, scale = torch.empty(shape, dtype=torch.float8_e4m3fn), torch.empty(granularity.scale_shape(shape))
        library.quantize(self.w, *granularity.block(shape), data, scale, ue8m0=self.scheme.scale_format == "ue8m0")


@dataclass(frozen=True)
class _Packed:
    """One layer's weight under a scheme: the copies that each engine packed, and why others refused it."""

    weights: Weights
    by_engine: dict[str, list[PackedWeight]]
    refused: dict[str, str]


class Layers:
    """Copies of one layer: dense, packed by each engine under each scheme, and made by each peer; why the others do not
    take part.

    All of them meet in one contest, so that schemes can be compared as well. Peers have scales of their own: they, and
    the dense layers, stand beside the first scheme.
    """

    def __init__(
        self,
        n: int,
        k: int,
        schemes: Sequence[str],
        dtype: str,
        *,
        engines: Iterable[str],
        peers: Iterable[str],
        cold: int,
    ) -> None:
        self.about = {"dtype": dtype, "n": n, "k": k}
        torch.set_num_threads(1)  # many small operations, in which threads would only wait for each other
        count = max(1, -(-cold * 10**6 // (n * k)))
        self.packed: dict[str, _Packed] = {}
        for scheme in schemes:
            weights = Weights(n, k, GRANULARITIES[scheme], CPU, dtype=DTYPES[dtype], count=count)
            by_engine, refused = pack(weights, engines, probe("cpu"))
            reasons = {name: result.note for name, result in refused.items()}
            self.packed[scheme] = _Packed(weights, by_engine, reasons)
        self.first = schemes[0]
        self.dense = self.packed[self.first].weights.dense()
        self.peers: dict[str, Peer] = {}
        self.absent: dict[str, str] = {}
        for name in peers:
            try:
                self.peers[name] = make(name, self.dense)
            except Absent as reason:
                self.absent[name] = str(reason)

    def rows(self, tokens: list[int], threads: int, seconds: float, longest: float) -> Iterator[Row]:
        """For each M and scheme a row for what multiplies: ``dense`` first, with milliseconds, or ``absent`` with the
        reason."""
        absent = {(scheme, name): why for scheme, own in self.packed.items() for name, why in own.refused.items()}
        absent |= {(self.first, name): why for name, why in self.absent.items()}
        for m in tokens:
            entrants = {key: entrant for key, entrant in self.entrants(m).items() if key not in absent}
            exempt = [entrant.calls for (_, name), entrant in entrants.items() if name not in self.peers]
            with quiet():
                found = contest(entrants, partial(watch, longest=longest, exempt=exempt), seconds=seconds)
            dense = (self.first, "dense")
            base = found[dense].seconds
            results = {**found, **{key: Result(note=note) for key, note in absent.items()}}
            for scheme in self.packed:
                for key in (dense, *(key for key in results if key[0] == scheme and key != dense)):
                    result = results[key]
                    row = {**self.about, "scheme": scheme, "threads": threads, "m": m, "name": key[1]}
                    if result.seconds is None:
                        yield {**row, "absent": result.note}
                    else:
                        times = {} if base is None else {"x dense": base / result.seconds}
                        checked = {"error": result.error, "tolerance": entrants[key].tolerance}
                        yield {**row, "ms": result.seconds * 1e3, **times, **checked, **self.kernel(*key, m)}
            # More tokens take longer still.
            absent |= {key: result.note for key, result in found.items() if result.note.startswith("OverBudget")}

    def entrants(self, m: int) -> dict[tuple[str, str], Entrant]:
        """What multiplies the same ``m`` tokens, by scheme and name."""
        x = self.packed[self.first].weights.tokens(m)
        entrants: dict[tuple[str, str], Entrant] = {}
        for scheme, own in self.packed.items():
            expectation = Expectation(x, own.weights)
            if scheme == self.first:
                entrants[scheme, "dense"] = dense_entrant(self.dense, expectation)
            for name, copies in own.by_engine.items():
                entrants[scheme, name] = bound_entrant(name, copies, expectation)
        for name, peer in self.peers.items():
            calls = [partial(layer, x) for layer in peer.layers]
            expected = x.float() @ peer.weight.t()
            entrants[self.first, name] = Entrant(calls=calls, expected=expected, tolerance=peer.tolerance)
        return entrants

    def kernel(self, scheme: str, name: str, m: int) -> Row:
        """The name of an engine's kernel."""
        own = self.packed[scheme]
        copies = own.by_engine.get(name)
        return {} if copies is None else {"kernel": ENGINES[name].kernel(m, copies[0], own.weights.dtype)}

    def quantizers(self, threads: int, seconds: float) -> Iterator[Row]:
        """For each scheme the milliseconds in which torch's operations and the compiled kernel quantize the weight."""
        library = native.loaded()
        for scheme, own in self.packed.items():
            both = _Quantizer(self.dense[0], own.weights.scheme)
            calls: dict[str, Callable[[], object]] = {"torch": both.torch}
            if library is not None:
                calls["native"] = partial(both.native, library)
            took = {name: each * 1e3 for name, each in paired_seconds(calls, seconds=seconds).items()}
            yield {**self.about, "scheme": scheme, "threads": threads, **took}


def bound_entrant(name: str, copies: list[PackedWeight], expectation: Expectation) -> Entrant:
    """An engine's product as ``FP8Linear`` calls it: with all decisions made, where the engine can make them before."""
    entrant, x = entrant_of(ENGINES[name], copies, expectation), expectation.x
    bound = [ENGINES[name].bind(x, copy, None, x.dtype) for copy in copies]
    calls = [call if run is None else partial(run, x) for run, call in zip(bound, entrant.calls, strict=True)]
    return Entrant(calls=calls, expected=entrant.expected, tolerance=entrant.tolerance)


def report(rows: list[Row]) -> str:
    """Rows of one layer as a table: milliseconds of the dense product, the speed of all others relative to it."""
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] != "dense"))
    by_m: dict[int, Row] = {}
    for row in rows:
        shown = by_m.setdefault(row["m"], {"M": row["m"]})
        shown |= {"dense ms": row.get("ms")} if row["name"] == "dense" else {row["name"]: row.get("x dense")}
    first = rows[0]
    lines = [f"{first['dtype']}, {first['n']} x {first['k']}, {first['scheme']}, {first['threads']} threads: x dense"]
    lines.append(table(list(by_m.values()), ["M", "dense ms", *names]))
    rounding = {row["name"]: row["tolerance"] for row in rows if row.get("tolerance", 0) >= INT8_TOLERANCE}
    lines += [f"{name} rounds activations: checked to {allowed:.1%}" for name, allowed in rounding.items()]
    absent: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if "absent" in row:
            absent.setdefault((row["name"], row["absent"]), []).append(row["m"])
    lines += [f"{name} absent at M = {', '.join(map(str, ms))}: {why}" for (name, why), ms in absent.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
