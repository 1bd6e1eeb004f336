"""All available implementations of one product: bfloat16, fp8gemm's layer and its engines, and the peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType

import torch
import torch.nn.functional as F
from card import with_torchao
from gpu_cases import Case
from torch import nn

from fp8gemm import (
    ENGINES,
    SCHEMES,
    TENSOR,
    FP8GemmOptions,
    FP8Linear,
    Granularity,
    MatmulSpec,
    ScaledTensor,
    UnsupportedError,
    choose,
    dequantize,
    probe,
)
from fp8gemm.bench.contest import COLD_BYTES
from fp8gemm.engines import order
from fp8gemm.weights.quantization import quantize_weight

GEMV_TOKENS = 4  # the largest M that FBGEMM's kernels of this name support


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A product, once for each copy of the weight; ``expected`` is set if its weight is quantized differently."""

    calls: list[Callable[[], torch.Tensor]]
    expected: Callable[[], torch.Tensor] | None = None
    note: Callable[[], str] = lambda: ""


Maker = Callable[[], Candidate]


class Operands:
    """Random tokens, many copies of a weight in bfloat16 and in FP8, and the float32 product to check against."""

    def __init__(self, case: Case, device: str = "cuda") -> None:
        self.case = case
        self.device = device
        self.scheme = SCHEMES["block" if case.kind == "block" else "row"]
        shape = (case.experts, case.n, case.k) if case.experts else (case.n, case.k)
        self.dense = torch.randn(shape, device=device, dtype=torch.bfloat16) * case.k**-0.5
        self.x = torch.randn(case.m, case.k, device=device, dtype=torch.bfloat16)
        self.weight = _quantized(self.dense, self.scheme.weight)
        self.copies = max(1, min(16, COLD_BYTES // self.weight.data.nbytes))
        self.ends: torch.Tensor | None = None
        if case.experts:
            expert = torch.randint(case.experts, (case.m,), device=device).sort().values
            every = torch.arange(1, case.experts + 1, device=device)
            self.ends = torch.searchsorted(expert, every).to(torch.int32)

    def expected(self) -> torch.Tensor:
        if self.ends is None:
            return self.x.float() @ dequantize(self.weight).t()
        y = torch.zeros(self.case.m, self.case.n, device=self.device)
        start = 0
        for expert, end in enumerate(self.ends.tolist()):
            if end > start:
                one = ScaledTensor(self.weight.data[expert], self.weight.scale[expert], self.weight.granularity)
                y[start:end] = self.x[start:end].float() @ dequantize(one).t()
            start = end
        return y

    @cached_property
    def linears(self) -> list[nn.Linear]:
        """The layers in bfloat16, each with its own weight."""
        return [_linear(self.dense.clone()) for _ in range(self.copies)]

    @cached_property
    def torchao_linears(self) -> list[nn.Linear]:
        layers = [_linear(self.dense.clone()) for _ in range(self.copies)]
        for layer in layers:
            with_torchao(layer)
        return layers

    def fp8_copies(self, weight: ScaledTensor | None = None) -> list[ScaledTensor]:
        weight = self.weight if weight is None else weight
        return [ScaledTensor(weight.data.clone(), weight.scale.clone(), weight.granularity) for _ in range(self.copies)]


def _linear(w: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta", dtype=w.dtype)
    linear.weight = nn.Parameter(w, requires_grad=False)
    return linear


def _quantized(dense: torch.Tensor, granularity: Granularity) -> ScaledTensor:
    if dense.dim() == 2:
        return quantize_weight(dense, granularity)
    parts = [quantize_weight(one, granularity) for one in dense]
    return ScaledTensor(
        torch.stack([one.data for one in parts]), torch.stack([one.scale for one in parts]), granularity
    )


def candidates(operands: Operands, peers: ModuleType | None) -> dict[str, Maker | str]:
    """The functions that make each candidate, by name; or why it is not available."""
    case, machine = operands.case, probe(operands.device)
    spec = MatmulSpec(scheme=operands.scheme, n=case.n, k=case.k, experts=case.experts)
    found: dict[str, Maker | str] = {"bf16": partial(_bf16, operands)}
    for name in order(machine):
        reasons = ENGINES[name].rejects(spec, machine)
        found[f"fp8gemm {name}"] = "; ".join(reasons) if reasons else partial(_engine, operands, name)
    try:
        winner = choose(spec, machine).winner
        # For a stack it is the same product as the engine's, so that measure() times it once.
        found["fp8gemm auto"] = found[f"fp8gemm {winner}"] if case.experts else partial(_layer, operands)
    except UnsupportedError as error:
        found["fp8gemm auto"] = str(error)
    if case.kind == "row":
        found |= {"torchao eager": partial(_torchao, operands), "torchao compiled": partial(_compiled, operands)}
    if peers is not None:
        found |= _block_peers(operands, peers) if case.kind == "block" else _row_peers(operands, peers)
    if peers is not None and case.kind == "row" and case.m <= GEMV_TOKENS:
        found |= {name: partial(_gemv, operands, f) for name, f in peers.w8a16(torch).items()}
    return found


def _bf16(operands: Operands) -> Candidate:
    x, ends = operands.x, operands.ends
    if ends is None:
        return Candidate(calls=[partial(linear, x) for linear in operands.linears])
    copies = [operands.dense.clone() for _ in range(operands.copies)]
    return Candidate(calls=[lambda w=w: F.grouped_mm(x, w.transpose(-2, -1), offs=ends) for w in copies])


def _engine(operands: Operands, name: str) -> Candidate:
    engine, x, ends = ENGINES[name], operands.x, operands.ends
    if ends is None:
        packed = [engine.prepare(copy, operands.scheme) for copy in operands.fp8_copies()]
        return Candidate(calls=[lambda w=w: engine.linear(x, w, None, torch.bfloat16) for w in packed])
    stacks = [engine.prepare_stack(copy, operands.scheme) for copy in operands.fp8_copies()]
    return Candidate(calls=[lambda w=w: engine.grouped(x, w, ends, None, torch.bfloat16) for w in stacks])


def _layer(operands: Operands) -> Candidate:
    """``FP8Linear`` as ``enable_fp8_gemm`` makes it: what a model really runs."""
    options = FP8GemmOptions(scheme=operands.scheme)
    layers = [FP8Linear.from_linear(linear, options) for linear in operands.linears]

    def note() -> str:
        return f"is {layers[0].engine}: {', '.join(layers[0].activity.kernels)}"

    return Candidate(calls=[partial(layer, operands.x) for layer in layers], note=note)


def _torchao(operands: Operands) -> Candidate:
    layers = operands.torchao_linears
    return Candidate(
        calls=[partial(layer, operands.x) for layer in layers], expected=partial(_expected_of_torchao, operands)
    )


def _compiled(operands: Operands) -> Candidate:
    layers = operands.torchao_linears
    torch.compiler.reset()  # compile each shape separately, as Dynamo stops after eight recompilations

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w)

    compiled = torch.compile(product, dynamic=False)
    return Candidate(
        calls=[partial(compiled, operands.x, layer.weight) for layer in layers],
        expected=partial(_expected_of_torchao, operands),
    )


def _expected_of_torchao(operands: Operands) -> torch.Tensor:
    return operands.x.float() @ operands.torchao_linears[0].weight.dequantize().float().t()


def _gemv(operands: Operands, f: Callable[..., torch.Tensor]) -> Candidate:
    """A weight-only product with a weight that has one scale."""
    weight, x = quantize_weight(operands.dense, TENSOR), operands.x
    return Candidate(
        calls=[partial(f, x, w.data, w.scale.view(1)) for w in operands.fp8_copies(weight)],
        expected=lambda: x.float() @ dequantize(weight).t(),
    )


def _block_peers(operands: Operands, peers: ModuleType) -> Mapping[str, Maker | str]:
    """Peers' products after fp8gemm's quantization, whose scales have the layout that they all read."""
    try:
        from fp8gemm.engines.triton.kernels import quantize as kernels
    except ImportError as error:
        return dict.fromkeys(peers.blockwise(torch), f"no quantization kernel: {error}")
    return {name: partial(_product, operands, kernels.quantize_groups, f) for name, f in peers.blockwise(torch).items()}


def _row_peers(operands: Operands, peers: ModuleType) -> Mapping[str, Maker | str]:
    """Peers' products after their own quantization, or after the first one available."""
    quantizers = peers.rowquant(torch)
    products = peers.rowwise(torch) if operands.ends is None else peers.grouped(torch)
    found: dict[str, Maker | str] = {}
    for name, f in products.items():
        own = next((q for q in quantizers if q.split("_")[0] == name.split("_")[0]), next(iter(quantizers), None))
        if own is None:
            found[name] = "no quantization kernel of a peer is there"
        elif "gemv" in name and operands.case.m > GEMV_TOKENS:
            found[name] = f"takes at most {GEMV_TOKENS} tokens"
        else:
            found[f"{name} + {own}"] = partial(_product, operands, quantizers[own], f)
    return found


def _product(
    operands: Operands, rounds: Callable[..., tuple[torch.Tensor, ...]], f: Callable[..., object]
) -> Candidate:
    """``f`` of tokens that ``rounds`` has quantized, with operands in the order that peers.py expects."""
    x, more = operands.x, () if operands.ends is None else (operands.ends,)

    def call(w: ScaledTensor) -> torch.Tensor:
        xq, scale = rounds(x)
        return f(xq, w.data, scale if scale.dim() == 2 else scale.view(-1, 1), w.scale, *more)

    return Candidate(calls=[partial(call, w) for w in operands.fp8_copies()])
