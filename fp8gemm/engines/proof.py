"""An engine's proof on a device: small products that are exact in any correct implementation, compared bit for bit.

A library's version does not say whether its kernels work on a device, nor which layout of scales they read; a product
does. Every kernel that an engine chooses among is run once, before ``auto`` or a user relies on it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from ..numerics import dequantize
from ..scaled import TENSOR, ScaledTensor
from .base import Engine, MatmulSpec

EXPERTS = 2
# Tokens of the experts: few, dozens and hundreds for each, and one expert without any.
ROUTINGS = ((3, 5), (0, 7), (30, 50), (100, 160))
TINY = 2.0**-40  # far below vLLM's smallest scale, 1 / (448 * 512)

_proven: dict[tuple[object, ...], str] = {}


def problem(engine: Engine, spec: MatmulSpec, device: torch.device) -> str:
    """Why ``engine`` must not run problems like ``spec`` on ``device``; empty if its products are exact there.

    Runs them at the first problem of each kind: the scheme, the dtypes, and whether N and K are multiples of 16 and of
    128. Compiling takes seconds the first time on a machine.
    """
    small = replace(spec, n=_small(spec.n, 256), k=_small(spec.k, 1024), experts=EXPERTS if spec.experts else 0)
    small = replace(small, accumulate="fast" if spec.fast else "precise")
    key = (engine, small, device)
    if key not in _proven:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            _proven[key] = _problem(engine, small, device)
    return _proven[key]


def _small(size: int, enough: int) -> int:
    """A size that a kernel divides into tiles as it does ``size``: by 128, by 16, or with a rest."""
    return enough + (size % 16 or (16 if size % 128 else 0))


def _problem(engine: Engine, spec: MatmulSpec, device: torch.device) -> str:
    generator = torch.Generator("cpu").manual_seed(0)
    weight = exact_weight(spec, generator)
    kernel = "preparation"
    try:
        products = _grouped if spec.experts else _products
        for kernel, m, product, expected in products(engine, spec, weight, device, generator):
            y = product()
            # Kernels run asynchronously: a fault would otherwise surface in the user's next operation.
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if wrong := difference(y, expected):
                return f"its {kernel} for {m} tokens {wrong}, under {spec.scheme}"
    except Exception as error:  # whatever a compiler, a driver or a library may raise
        return f"its {kernel} fails here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def difference(y: torch.Tensor, exact: torch.Tensor) -> str:
    """Where a product is not the ``exact`` one, in float64 on the CPU; empty if it is, bit for bit, NaN included."""
    if y.shape != exact.shape:
        return f"gives shape {tuple(y.shape)} instead of {tuple(exact.shape)}"
    wrong = ~y.cpu().double().isclose(exact, rtol=0, atol=0, equal_nan=True)
    if not wrong.any():
        return ""
    row, column = (int(index) for index in wrong.nonzero()[0])
    return f"gives {y[row, column].item()} where {exact[row, column].item()} is exact"


Compared = tuple[str, int, Callable[[], torch.Tensor], torch.Tensor]  # kernel, M, product, exact result in float64


def _products(
    engine: Engine, spec: MatmulSpec, weight: ScaledTensor, device: torch.device, generator: torch.Generator
) -> Iterator[Compared]:
    packed = replace(
        engine.prepare(weight.to(device), spec.scheme, input_scale=input_scale(spec, device)),
        accumulate=spec.accumulate,
    )
    bias = _integers(-3, 3, (spec.n,), generator).to(spec.compute_dtype)
    bias[::2] = 0  # where a tiny token's products are not lost beside it
    for trial in engine.trials(packed, spec.compute_dtype):
        x = exact_tokens(trial.m, spec, generator)
        exact = x.double() @ dequantize(weight, torch.float64).t() + bias.double()
        product = partial(trial.run, x.to(device), bias.to(device))
        yield trial.kernel, trial.m, product, exact.to(spec.compute_dtype).double()


def _grouped(
    engine: Engine, spec: MatmulSpec, weight: ScaledTensor, device: torch.device, generator: torch.Generator
) -> Iterator[Compared]:
    packed = engine.prepare_stack(weight.to(device), spec.scheme)
    packed = replace(packed, accumulate=spec.accumulate)
    for counts in ROUTINGS:
        m = sum(counts)
        x = exact_tokens(m, spec, generator)
        ends = torch.tensor(counts, dtype=torch.int32, device="cpu").cumsum(0).to(torch.int32)
        product = partial(engine.grouped, x.to(device), packed, ends.to(device), None, spec.compute_dtype)
        parts = zip(torch.split(x.double(), list(counts)), dequantize(weight, torch.float64), strict=True)
        exact = torch.cat([tokens @ w.t() for tokens, w in parts])
        yield "grouped product", m, product, exact.to(spec.compute_dtype).double()


def exact_weight(spec: MatmulSpec, generator: torch.Generator) -> ScaledTensor:
    """Codes of -1, 0 and 1, with scales of 1 and 2 by turns at random, so that scales in another order are noticed.

    Every 32nd column is zero: there ``exact_tokens`` has its largest values.
    """
    shape = (spec.experts, spec.n, spec.k) if spec.experts else (spec.n, spec.k)
    codes = _integers(-1, 1, shape, generator)
    codes[..., ::32] = 0
    scale = 2.0 ** _integers(0, 1, spec.scheme.weight.scale_shape(shape), generator)
    return ScaledTensor(codes.float().to(spec.weight_dtype), scale.float(), spec.scheme.weight)


def exact_tokens(m: int, spec: MatmulSpec, generator: torch.Generator) -> torch.Tensor:
    """-1, 0 and 1, and a 448 in every 32 features, which makes every scale 1 and the quantization exact.

    The last token but one is NaN in one feature and the last one is tiny, where the dtype and the scheme allow that.
    """
    x = _integers(-1, 1, (m, spec.k), generator).to(spec.compute_dtype)
    x[:, ::32] = 448
    scheme = spec.scheme
    if m >= 3:
        x[-2, 0] = torch.nan
        if spec.compute_dtype != torch.float16 and not scheme.static and scheme.activation != TENSOR:
            x[-1] *= TINY
    return x


def _integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random integers from ``low`` to ``high``, on the CPU whatever the default device is."""
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int64, device="cpu")


def input_scale(spec: MatmulSpec, device: torch.device) -> torch.Tensor | None:
    """The static scale of 1 with which ``exact_tokens`` are quantized exactly; None for schemes without one."""
    return torch.ones((), dtype=torch.float32, device=device) if spec.scheme.static else None
