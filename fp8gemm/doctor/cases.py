"""Exact products of every engine, run in a process of their own: ``python -m fp8gemm.doctor.cases``, by ``probing``.

The journal, a file of JSON lines, says when each product begins and ends, so that one in which the process dies, or
that never ends, is known by its name.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..engines import ENGINES, MatmulSpec, probe, proof
from ..errors import UnsupportedError
from ..numerics import dequantize
from ..scaled import MX, SCHEMES, ScaledTensor, Scheme

PROBED_SCHEMES: dict[str, Scheme] = {
    **{str(name): scheme for name, scheme in SCHEMES.items()},
    "static": replace(SCHEMES["tensor"], static=True),
    "mx weight_only": Scheme(weight=MX, activation=None, scale_format="ue8m0"),
}
N, K = 256, 1024
LARGE_K = 16384  # beyond what fast accumulators add exactly: see ``base.FAST_UP_TO_K``


@dataclass(frozen=True, kw_only=True)
class Product:
    """One row of the probe: an engine's product of one kind, under one scheme."""

    device: str
    engine: str
    scheme: str
    case: str

    @property
    def spec(self) -> MatmulSpec:
        n, k, experts = CASES[self.case][:3]
        return MatmulSpec(scheme=PROBED_SCHEMES[self.scheme], n=n, k=k, experts=experts)

    def run(self) -> tuple[str, str]:
        """The status and a note; the note of an exact product is empty."""
        device = torch.device(self.device)
        try:
            with torch.no_grad():
                problem = CASES[self.case][3](self, device)
        except UnsupportedError as error:
            return "refused", " ".join(str(error).split())
        except Exception as error:  # whatever a compiler, a driver or a library may raise
            return "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
        if not problem:
            return "exact", ""
        return ("failed" if " fails here: " in problem else "wrong"), problem


def _check_of_its_own(product: Product, device: torch.device) -> str:
    """As before an engine is used on an accelerator: every kernel that it chooses among."""
    engine, spec = ENGINES[product.engine], product.spec
    weight = proof.exact_weight(spec, torch.Generator("cpu").manual_seed(0)).to(device)
    if spec.experts:
        engine.prepare_stack(weight, spec.scheme)  # may refuse these bytes, which is no fault
    else:
        engine.prepare(weight, spec.scheme, input_scale=proof.input_scale(spec, device))
    return proof.problem(engine, spec, device)


def _tokens(change: Callable[[torch.Tensor, ScaledTensor], object], m: int) -> Callable[[Product, torch.device], str]:
    """A product of ``m`` exact tokens, after ``change`` of the tokens and the weight."""

    def run(product: Product, device: torch.device) -> str:
        engine, spec = ENGINES[product.engine], product.spec
        generator = torch.Generator("cpu").manual_seed(0)
        weight = proof.exact_weight(spec, generator)
        if device.type == "cpu":  # where sums are float32, so that no code has to be zero: vLLM's op takes few zeros
            codes = weight.data.to(torch.float32)
            weight = replace(weight, data=torch.where(codes == 0, 1, codes).to(spec.weight_dtype))
        x = proof.exact_tokens(m, spec, generator).nan_to_num(nan=1.0)
        change(x, weight)
        packed = engine.prepare(weight.to(device), spec.scheme, input_scale=proof.input_scale(spec, device))
        y = engine.linear(x.to(device), replace(packed, accumulate="precise"), None, spec.compute_dtype)
        exact = (x.double() @ dequantize(weight, torch.float64).t()).to(spec.compute_dtype).double()
        wrong = proof.difference(y, exact)
        return f"{wrong}, {m} tokens of K = {spec.k}" if wrong else ""

    return run


def _zero_rows(x: torch.Tensor, weight: ScaledTensor) -> None:
    x[1] = 0
    weight.data.view(torch.uint8)[3:6] = 0


def _nan_in_one_row(x: torch.Tensor, weight: ScaledTensor) -> None:
    x[2, 5] = torch.nan


def _nothing(x: torch.Tensor, weight: ScaledTensor) -> None:
    """The tokens and the weight stay as they are."""


# By name: N, K, experts, and what is run.
CASES: dict[str, tuple[int, int, int, Callable[[Product, torch.device], str]]] = {
    "its own check": (N, K, 0, _check_of_its_own),
    "one row": (N, K, 0, _tokens(_nothing, 1)),
    "zero rows": (N, K, 0, _tokens(_zero_rows, 5)),
    "NaN in one row": (N, K, 0, _tokens(_nan_in_one_row, 5)),
    "odd sizes": (37, 1027, 0, _tokens(_nothing, 3)),
    "large K": (64, LARGE_K, 0, _tokens(_nothing, 4)),
    "experts": (N, K, proof.EXPERTS, _check_of_its_own),
}


def products(devices: list[str]) -> Iterator[Product]:
    """What the engines of these devices do not reject."""
    for device in devices:
        machine = probe(device)
        for engine in ENGINES:
            for scheme in PROBED_SCHEMES:
                for case in CASES:
                    product = Product(device=device, engine=engine, scheme=scheme, case=case)
                    if not ENGINES[engine].rejects(product.spec, machine):
                        yield product


def main(journal: Path, devices: list[str], imports: list[str], done: int, skipped: list[list[str]]) -> None:
    """Runs the products from number ``done`` on, except those of the skipped pairs of device and engine."""
    with journal.open("a") as stream:

        def write(**line: Any) -> None:
            stream.write(json.dumps(line) + "\n")
            stream.flush()

        for module in imports:
            importlib.import_module(module)
        wanted = list(products(devices))
        write(products=[vars(product) for product in wanted])
        for number, product in enumerate(wanted):
            if number < done or [product.device, product.engine] in skipped:
                continue
            write(begin=number)
            began = time.perf_counter()
            status, note = product.run()
            write(end=number, status=status, note=note, seconds=time.perf_counter() - began)
        write(over=True)


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    main(Path(request.pop("journal")), **request)
