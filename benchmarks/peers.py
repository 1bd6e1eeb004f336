"""A Linear as other libraries quantize it on a CPU: whatever is installed, each with what it multiplies by."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fp8gemm import BLOCK_128, SCHEMES, MatmulSpec, dequantize, probe, quantize
from fp8gemm.bench.contest import BF16_TOLERANCE
from fp8gemm.engines.vllm import Vllm, VllmEngine

# torch quantizes activations to 7 bits (FBGEMM without VNNI) or 8, over the range of the tensor. A million normal
# values span 10 standard deviations: a step of 10 / 127, an error of step / sqrt(12) = 2.3 % of each activation.
INT8_TOLERANCE = 2**-5

Call = Callable[[torch.Tensor], torch.Tensor]
Copies = Sequence[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Copies of one layer, the weight ``[N, K]`` by which they multiply, and their largest relative error."""

    layers: Sequence[Call]
    weight: torch.Tensor
    tolerance: float = BF16_TOLERANCE


class Absent(Exception):
    """Why a library does not take part."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries print and warn about when they are imported or used."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def make(name: str, copies: Copies) -> Peer:
    """The peer of this name, made of copies ``[N, K]`` of a dense weight.

    Raises:
        Absent: it is not installed, or does not support the weight; with the reason.
    """
    try:
        with quiet(), torch.no_grad():
            return PEERS[name](copies)
    except ImportError as error:
        raise Absent(f"not installed: {error}") from error
    except Exception as error:  # libraries fail in many ways; the others still take part
        reason = str(error) if isinstance(error, Absent) else f"{type(error).__name__}: {error}"
        raise Absent(" ".join(reason.split())[:200]) from error


def _linears(copies: Copies) -> list[nn.Sequential]:
    """A model of one layer for each copy, in the copy's dtype and memory."""
    models = []
    for w in copies:
        linear = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype, device="meta")
        linear.weight = nn.Parameter(w, requires_grad=False)
        models.append(nn.Sequential(linear).eval())
    return models


def _cast(copies: Copies) -> Peer:
    """Plain FP8 weights, as a model has that was cast with ``.to(torch.float8_e4m3fn)``."""
    codes = [w.to(torch.float8_e4m3fn) for w in copies]
    return Peer(layers=[lambda x, w=w: F.linear(x, w.to(x.dtype)) for w in codes], weight=codes[0].float())


def _int8_dynamic(engine: str) -> Callable[[Copies], Peer]:
    """``torch.ao.quantization.quantize_dynamic``; it takes float32, so others convert activations and outputs."""

    def make_peer(copies: Copies) -> Peer:
        from torch.ao.quantization import quantize_dynamic

        if engine not in torch.backends.quantized.supported_engines:
            raise Absent(f"this torch has no {engine}")
        before, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
        try:
            models = (_linears([w.float()])[0] for w in copies)
            layers = [quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)[0] for model in models]
        finally:
            torch.backends.quantized.engine = before
        weight = layers[0].weight().dequantize()
        if copies[0].dtype == torch.float32:
            return Peer(layers=layers, weight=weight, tolerance=INT8_TOLERANCE)
        wide: list[Call] = [lambda x, layer=layer: layer(x.float()).to(x.dtype) for layer in layers]
        return Peer(layers=wide, weight=weight, tolerance=INT8_TOLERANCE)

    return make_peer


def _torchao(config: str) -> Callable[[Copies], Peer]:
    def make_peer(copies: Copies) -> Peer:
        quantization: Any = importlib.import_module("torchao.quantization")
        models = _linears(copies)
        for model in models:
            quantization.quantize_(model, getattr(quantization, config)())
        layers = [model[0] for model in models]
        return Peer(layers=layers, weight=layers[0].weight.dequantize().float())

    return make_peer


def _quanto(copies: Copies) -> Peer:
    quanto: Any = importlib.import_module("optimum.quanto")
    models = _linears([w.clone() for w in copies])
    for model in models:
        quanto.quantize(model, weights=quanto.qfloat8_e4m3fn)
        quanto.freeze(model)
    layers = [model[0] for model in models]
    return Peer(layers=layers, weight=layers[0].weight.dequantize().float())


def _sdnq(copies: Copies) -> Peer:
    """SDNQ compiles its dequantization; torch forgets other layers' first, as it keeps only few versions."""
    sdnq: Any = importlib.import_module("sdnq")
    torch._dynamo.reset()
    options = {"weights_dtype": "float8_e4m3fn", "torch_dtype": copies[0].dtype, "use_quantized_matmul": False}
    models = [sdnq.sdnq_post_load_quant(model, **options) for model in _linears([w.clone() for w in copies])]
    layers = [model[0] for model in models]
    weight = layers[0].sdnq_dequantizer(layers[0].weight, layers[0].scale, skip_compile=True)
    return Peer(layers=layers, weight=weight.float())


def _vllm(copies: Copies) -> Peer:
    """The raw op with 128 x 128 scales, which it applies itself; the engine ``vllm`` adds other scales and padding."""
    n, k = copies[0].shape
    spec = MatmulSpec(scheme=SCHEMES["block"], n=n, k=k, compute_dtype=copies[0].dtype)
    reasons = VllmEngine().rejects(spec, probe("cpu"))
    if n % 32 or k % 32:
        reasons.append("N and K must be multiples of 32")
    if reasons:
        raise Absent("; ".join(reasons))
    weights = [quantize(w, BLOCK_128) for w in copies]
    ops = torch.ops._C

    def layer(data: torch.Tensor, scale: torch.Tensor) -> Call:
        packed = ops.convert_weight_packed(data)
        return lambda x: ops.fp8_scaled_mm_cpu(x, packed, scale, [128, 128], None, x.dtype, True)

    return Peer(layers=[layer(w.data, w.scale) for w in weights], weight=dequantize(weights[0]))


PEERS: dict[str, Callable[[Copies], Peer]] = {
    "torch int8 fbgemm": _int8_dynamic("fbgemm"),
    "torch int8 onednn": _int8_dynamic("onednn"),
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao fp8": _torchao("Float8WeightOnlyConfig"),
    "quanto fp8": _quanto,
    "sdnq fp8": _sdnq,
    "vllm op": _vllm,
    "cast": _cast,
}


def versions() -> dict[str, str]:
    """The installed versions of the libraries that take part; vLLM's is read as its engine reads it."""
    found = {}
    for name in ("torchao", "optimum-quanto", "sdnq"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    vllm = probe("cpu").facts("vllm", Vllm)
    return found if vllm is None else {**found, "vllm": vllm.version}
