"""Questions that only a card answers, as a step of benchmarks/first_contact.py: rates, accumulators, special values,
torch's own FP8 products, and CUDA graphs made by torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from card import card_seconds
from contact_journal import Found, Refused, Rows, Work
from torch import nn

from fp8gemm import (
    BLOCK_128,
    ENGINES,
    GROUP_128,
    ROW,
    SCHEMES,
    TENSOR,
    MatmulSpec,
    ScaledTensor,
    dequantize,
    enable_fp8_gemm,
    probe,
    quantize,
)
from fp8gemm.bench.place import device_of
from fp8gemm.engines import AUTO, Engine
from fp8gemm.engines.reference import ReferenceEngine
from fp8gemm.engines.torch_mm import TorchEngine
from fp8gemm.engines.triton import TritonEngine
from fp8gemm.engines.triton.plan import BF16_FLOPS, BYTES_PER_SECOND, Kind, formula
from fp8gemm.engines.triton.tune import held

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
TOKENS = (1, 16, 256)
BITS = range(9, 29)  # of the sums that are tried, as e4m3 has powers of two from 2**-6 to 2**8
N, K = 128, 1024


def engines_of(device: str) -> list[str]:
    """The engines for a kind of device, those that auto tries first."""
    first = AUTO["native" if device == "cpu" else device]
    others = ("cpu", "reference") if device == "cuda" else ("triton", "deep_gemm", "vllm")
    return [name for name in dict.fromkeys((*first, *ENGINES)) if name not in others]


def probes(work: Work) -> Rows:
    device = work.device
    rows: dict[str, Callable[[], Found]] = {"rates": rates} if device == "cuda" else {}
    for engine in engines_of(device):
        for name in ("row", "block"):
            for m in TOKENS:
                rows[f"accumulator {engine} {name} M={m}"] = partial(accumulator, ENGINES[engine], name, m, device)
        for name in SCHEMES:
            rows[f"NaN and infinity {engine} {name}"] = partial(special_values, ENGINES[engine], name, device)
        rows[f"float16 without bias {engine}"] = partial(float16, ENGINES[engine], device)
    if device == "cuda":
        for name in ("row", "block"):
            rows[f"accumulator triton {name} M=256, its own kernel"] = partial(
                of_own_kernel, TritonEngine(), name, device
            )
    for dtype in (BF16, torch.float16, torch.float32):
        for fast in (True, False):
            called = f"torch rows {str(dtype).removeprefix('torch.')} {'fast' if fast else 'precise'}"
            rows[called] = partial(torch_rows, dtype, fast, device)
    rows["torch tensor"] = partial(torch_tensor, device)
    rows["torch blocks"] = partial(torch_blocks, device)
    rows["reduce-overhead"] = partial(compiled, device, mode="reduce-overhead")
    return rows


def rates() -> Found:
    """Bytes copied and bfloat16 operations per second, and what the package assumes."""
    x, y = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    copied = min(card_seconds(lambda: y.copy_(x)) for _ in range(20))
    multiplied = sorted(card_seconds(lambda: F.linear(a, b)) for _ in range(20))[10]
    return {
        "bytes per second": 2 * x.numel() / copied,
        "assumed bytes per second": BYTES_PER_SECOND,
        "bf16 per second": 2 * 8192**3 / multiplied,
        "assumed bf16 per second": BF16_FLOPS,
    }


def accumulator(engine: Engine, name: str, m: int, device: str) -> Found:
    """How many bits of partial sums an engine keeps: within one matrix instruction, and from one to the next."""
    _refuse(engine, MatmulSpec(scheme=SCHEMES[name], n=N, k=K), device)
    found: Found = {}
    for accumulate in ("fast", "precise"):
        for where, columns in (("within 32 products", (0, 3, 6)), ("across 256 products", (0, 256, 512))):
            weight, x = cancelling(name, m, columns, device)
            packed = replace(engine.prepare(weight, SCHEMES[name]), accumulate=accumulate)
            found[f"{accumulate}, {where}"] = kept_bits(engine.linear(x, packed, None, BF16).float().cpu())
            found["kernel"] = engine.kernel(m, packed, BF16)
    return found


def of_own_kernel(engine: TritonEngine, name: Kind, device: str) -> Found:
    """``accumulator`` of the kernel that the Triton engine runs where torch has no product."""
    where = replace(engine.place(device_of(device)), library=frozenset())
    m = max(TOKENS)
    return accumulator(held(engine, formula(where, name, N, K, m)), name, m, device)


def cancelling(name: str, m: int, columns: tuple[int, int, int], device: str) -> tuple[ScaledTensor, torch.Tensor]:
    """Operands whose products are 2**16, a small one, and -2**16, in these columns, and zeros.

    Of output i, the sum of the first two needs ``BITS[i]`` bits. A 448 for each group of activations makes their scale
    1; it meets a weight of zero.
    """
    first, small, last = columns
    w, x = torch.zeros(N, K), torch.zeros(m, K)
    x[:, 127::128] = 448
    x[:, first], x[:, last] = 256, -256
    w[:, first] = w[:, last] = 256
    # The column after ``small`` has activations for products that are smaller than weights can be.
    x[:, small], x[:, small + 1] = 1, 2.0**-6
    for row, bits in enumerate(BITS):
        power = 17 - bits
        w[row, small + (power < -6)] = 2.0 ** (power if power >= -6 else power + 6)
    grid = SCHEMES[name].weight
    return ScaledTensor(w.to(E4M3), torch.ones(grid.scale_shape(w.shape)), grid).to(device), x.to(device, BF16)


def kept_bits(y: torch.Tensor) -> int | str:
    """The largest number of bits up to which no sum lost its remainder, for any token."""
    expected = torch.tensor([2.0 ** (17 - bits) for bits in BITS])
    kept = (y[:, : len(BITS)] == expected).all(dim=0).tolist()
    lost = kept.index(False) if False in kept else len(kept)
    return f"{BITS[-1]} or more" if lost == len(kept) else BITS[lost - 1] if lost else f"below {BITS[0]}"


def special_values(engine: Engine, name: str, device: str) -> Found:
    """What becomes of NaN and infinity: each should reach its own token or output, and no other.

    Raises:
        ArithmeticError: one was lost, or spoilt others.
    """
    scheme, problems = SCHEMES[name], []
    _refuse(engine, MatmulSpec(scheme=scheme, n=256, k=K), device)
    dense = torch.randn(256, K, device=device)
    weight = quantize(dense, scheme.weight)
    code = weight.data.view(torch.uint8).clone()
    code[7, 300] = 0x7F
    packed = engine.prepare(weight, scheme)
    spoilt = engine.prepare(ScaledTensor(code.view(E4M3), weight.scale, weight.granularity), scheme)
    for m in TOKENS:
        for value in (float("nan"), float("inf")):
            x = torch.randn(m, K, device=device, dtype=BF16)
            x[0, 300] = value
            y = engine.linear(x, packed, None, BF16)
            if y[0].isfinite().any():
                problems.append(f"{value} is lost at M = {m}")
            if y[1:].isnan().any() and name != "tensor":  # whose tokens share a scale
                problems.append(f"{value} spoils other tokens at M = {m}")
        y = engine.linear(torch.randn(m, K, device=device, dtype=BF16), spoilt, None, BF16)
        if not y[:, 7].isnan().all() or y.isnan().sum() != m:
            problems.append(f"NaN in a weight reaches {int(y.isnan().sum())} outputs instead of {m} at M = {m}")
    if problems:
        raise ArithmeticError("; ".join(problems))
    return {"tokens": list(TOKENS)}


def float16(engine: Engine, device: str) -> Found:
    """The error of float16 products without a bias, against those of the same operands in float32.

    Raises:
        ArithmeticError: it is more than the engine's tolerance.
    """
    scheme, errors = SCHEMES["row"], {}
    _refuse(engine, MatmulSpec(scheme=scheme, n=256, k=K, compute_dtype=torch.float16), device)
    weight = quantize(torch.randn(256, K, device=device), scheme.weight)
    packed = engine.prepare(weight, scheme)
    for m in TOKENS:
        x = torch.randn(m, K, device=device).half()
        y = engine.linear(x, packed, None, torch.float16)
        like = replace(packed, data=weight.data, scheme=engine.rounds(m, packed, x.dtype), extra={})
        expected = ReferenceEngine().rounded(x, like).float() @ dequantize(weight).t()
        errors[m] = ((y.float() - expected).norm() / expected.norm()).item()
    if not max(errors.values()) <= engine.tolerance:
        raise ArithmeticError(f"relative errors by M: {errors}, more than {engine.tolerance}")
    return {"errors": errors}


def torch_rows(dtype: torch.dtype, fast: bool, device: str) -> Found:
    x, w = (quantize(torch.randn(256, 256, device=device), ROW) for _ in range(2))
    multiply = torch._scaled_mm
    return asked(lambda: multiply(x.data, w.data.t(), x.scale, w.scale.t(), out_dtype=dtype, use_fast_accum=fast), x, w)


def torch_tensor(device: str) -> Found:
    x, w = (quantize(torch.randn(256, 256, device=device), TENSOR) for _ in range(2))
    return asked(lambda: torch._scaled_mm(x.data, w.data.t(), x.scale, w.scale, out_dtype=BF16), x, w)


def torch_blocks(device: str) -> Found:
    x = quantize(torch.randn(256, 512, device=device), GROUP_128)
    w = quantize(torch.randn(512, 512, device=device), BLOCK_128)  # four blocks along K, which need no padding
    kinds = F.ScalingType

    def multiply() -> torch.Tensor:
        return F.scaled_mm(
            x.data,
            w.data.t(),
            scale_a=x.scale.t().contiguous().t(),
            scale_recipe_a=kinds.BlockWise1x128,
            scale_b=w.scale.t(),
            scale_recipe_b=kinds.BlockWise128x128,
            output_dtype=BF16,
        )

    return asked(multiply, x, w)


def asked(multiply: Callable[[], torch.Tensor], x: ScaledTensor, w: ScaledTensor) -> Found:
    """The error of one of torch's own products.

    Raises:
        Refused: torch does not have it here.
        ArithmeticError: it is wrong.
    """
    try:
        y = multiply()
    except (RuntimeError, ValueError) as error:
        raise Refused(" ".join(str(error).split())[:400]) from error
    expected = dequantize(x) @ dequantize(w).t()
    error = ((y.float() - expected).norm() / expected.norm()).item()
    if not error <= TorchEngine.tolerance:
        raise ArithmeticError(f"relative error {error:.1e}")
    return {"error": error}


@torch.no_grad()
def compiled(device: str, **how: str) -> Found:
    """A converted model under torch.compile at M = 16, called often enough to be in a graph, against eager mode.

    Raises:
        ArithmeticError: they differ by more than the rounding of their intermediate results.
    """
    model = nn.Sequential(nn.Linear(K, 2 * K), nn.GELU(), nn.Linear(2 * K, K)).to(device, BF16).requires_grad_(False)
    enable_fp8_gemm(model)
    faster = torch.compile(model, **how)
    errors = []
    for _ in range(4):
        x = torch.randn(16, K, device=device, dtype=BF16)
        expected = model(x).float()
        errors.append(((faster(x).float() - expected).norm() / expected.norm()).item())
    if not max(errors) <= 2e-2:
        raise ArithmeticError(f"relative errors of successive calls: {errors}")
    return {"errors": errors}


def _refuse(engine: Engine, spec: MatmulSpec, device: str) -> None:
    if reasons := engine.rejects(spec, probe(device)):
        raise Refused("; ".join(reasons))
