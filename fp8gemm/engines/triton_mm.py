"""Triton kernels of our own: any N and K, every scheme, cards from compute capability 8.0 on; dispatch by M."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from importlib import metadata
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from ..scaled import GROUP_128, ROW, ScaledTensor, Scheme
from . import triton_dispatch as dispatch
from . import triton_library
from .base import Engine, Machine, MatmulSpec, Prepared
from .triton_plan import Kind, Place, Plan, grouped_plan, place, precise

if TYPE_CHECKING:
    from .triton_kernels.quantize import Rounding

OLDEST_TRITON = (3, 6)
# Up to this K partial sums may stay in Hopper's 14-bit accumulator, as vLLM, FBGEMM and TensorRT-LLM leave them;
# torch's CUTLASS products stop doing so from 16384 on (pytorch#153809).
FAST_UP_TO_K = 8192
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonEngine(Engine):
    """One launch and activations as they are for few tokens, FP8 products for many.

    Activations are rounded per token under tensor and row schemes, and only beyond 64 tokens; 128 features at a time
    under the block scheme; never on cards before compute capability 8.9, which cannot multiply FP8. ``accumulate`` is
    how partial sums of FP8 products are kept: ``"precise"`` moves them to float32 after every 128 products, ``"fast"``
    does not, ``"auto"`` is fast up to K = 8192.
    """

    name = "triton"
    tolerance = 8e-3  # as torch's FP8 products: the 14-bit accumulator, beside the bfloat16 output

    def __init__(self, accumulate: Literal["fast", "precise", "auto"] = "auto") -> None:
        if accumulate not in ("fast", "precise", "auto"):
            raise ValueError(f"accumulate must be fast, precise or auto, found {accumulate!r}")
        self.accumulate = accumulate

    def prepare(self, weight: ScaledTensor, scheme: Scheme, *, input_scale: torch.Tensor | None = None) -> Prepared:
        weight = replace(weight, data=weight.data.contiguous(), scale=weight.scale.contiguous())
        prepared = super().prepare(weight, scheme, input_scale=input_scale)
        return replace(prepared, extra=(triton_library.library_scale(weight),), dtypes=_DTYPES)

    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        reasons = []
        if machine.device != "cuda":
            reasons.append(f"runs on cuda only, found {machine.device}")
        elif (machine.capability or (0, 0)) < (8, 0):
            found = "unknown" if machine.capability is None else "{}.{}".format(*machine.capability)
            reasons.append(f"needs compute capability 8.0 or newer, found {found}")
        if machine.triton_version is None:
            reasons.append("Triton is not installed")
        elif machine.triton_version < OLDEST_TRITON:
            found = "{}.{}".format(*machine.triton_version)
            reasons.append("needs Triton {}.{} or newer, found {}".format(*OLDEST_TRITON, found))
        if spec.compute_dtype not in _DTYPES:
            reasons.append(f"gives bfloat16, float16 or float32, not {str(spec.compute_dtype).removeprefix('torch.')}")
        if (spec.scheme.weight.cols or 16) % 16:
            reasons.append(f"takes scales along K in steps of 16, found {spec.scheme.weight}")
        return reasons

    def place(self, device: torch.device) -> Place:
        """What of a card decides which kernel runs."""
        return place_of(device)

    def plan(self, m: int, weight: Prepared, dtype: torch.dtype) -> Plan:
        """The kernel for ``m`` tokens, and its tiles."""
        where = self.place(weight.device)
        kind = dispatch.kind_of(weight, native=where.native)
        cols = weight.scheme.weight.cols or 0
        chosen = dispatch.plan(where, kind, weight.n, weight.k, m, wide=dtype == torch.float32, scale_cols=cols)
        if chosen.path == "rows" and self._accumulation(weight.k) == "precise":
            return precise(chosen)
        return chosen

    def rounds(self, m: int, weight: Prepared, dtype: torch.dtype = torch.bfloat16) -> Scheme:
        """The scheme that ``m`` tokens really meet: activations as they are, or rounded as the kernel for them does."""
        path = self.plan(max(m, 1), weight, dtype).path
        kind = dispatch.kind_of(weight, native=self.place(weight.device).native)
        if path in ("vectors", "tokens", "dense"):
            return weight.scheme.weight_only()
        static = weight.scheme.static
        activation = GROUP_128 if kind == "block" else weight.scheme.activation if static else ROW
        return Scheme(
            weight=weight.scheme.weight,
            activation=activation,
            static=static,
            scale_format=weight.scheme.scale_format,
        )

    def linear(
        self, x: torch.Tensor, weight: Prepared, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        m = x.shape[0]
        if m == 0 or weight.n == 0 or weight.k == 0:
            y = x.new_zeros(m, weight.n, dtype=out_dtype)
            return y if bias is None else y + bias.to(out_dtype)
        chosen = self.plan(m, weight, x.dtype)
        return _PATHS[chosen.path](self, x, weight, bias, out_dtype, chosen)

    def grouped(
        self,
        x: torch.Tensor,
        weight: Prepared,
        ends: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        from .triton_kernels import grouped

        tokens = x.shape[0]
        if tokens == 0 or weight.n == 0 or weight.k == 0 or weight.experts == 0:
            return x.new_zeros(tokens, weight.n, dtype=out_dtype)
        where = self.place(weight.device)
        kind = dispatch.kind_of(weight, native=where.native)
        cols = weight.scheme.weight.cols or 0
        wide = x.dtype == torch.float32
        chosen = grouped_plan(where, kind, weight.k, tokens, weight.experts, wide=wide, scale_cols=cols)
        scale = None
        if chosen.quantize_first:
            x, scale = _quantize(x, weight, kind)
        return grouped.multiply_grouped(
            x,
            scale,
            weight,
            ends,
            None if bias is None else bias.contiguous(),
            out_dtype,
            mode=chosen.mode,
            native=where.decodes if chosen.mode == "weight" else True,
            ue8m0=weight.scheme.scale_format == "ue8m0",
            block_m=chosen.block_m,
            block_n=chosen.block_n,
            block_k=chosen.block_k,
            warps=chosen.warps,
            stages=chosen.stages,
        )

    def kernel(self, m: int, weight: Prepared, dtype: torch.dtype) -> str:
        return f"triton {self.plan(max(m, 1), weight, dtype).path}"

    def _accumulation(self, k: int) -> Literal["fast", "precise"]:
        if self.accumulate == "auto":
            return "fast" if k <= FAST_UP_TO_K else "precise"
        return self.accumulate

    def _vectors(
        self,
        x: torch.Tensor,
        weight: Prepared,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        chosen: Plan,
    ) -> torch.Tensor:
        from .triton_kernels import w8a16

        return w8a16.multiply_vectors(
            x,
            weight,
            bias,
            out_dtype,
            native=self.place(weight.device).decodes,
            block_n=chosen.block_n,
            block_k=chosen.block_k,
            splits=chosen.splits,
            warps=chosen.warps,
        )

    def _tokens(
        self,
        x: torch.Tensor,
        weight: Prepared,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        chosen: Plan,
    ) -> torch.Tensor:
        from .triton_kernels import w8a16

        return w8a16.multiply_tokens(
            x,
            weight,
            bias,
            out_dtype,
            native=self.place(weight.device).decodes,
            block_m=chosen.block_m,
            block_n=chosen.block_n,
            block_k=chosen.block_k,
            splits=chosen.splits,
            warps=chosen.warps,
            stages=chosen.stages,
        )

    def _rows(
        self,
        x: torch.Tensor,
        weight: Prepared,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        chosen: Plan,
    ) -> torch.Tensor:
        from .triton_kernels import row

        xq, scale = _quantize(x, weight, "row")
        return row.multiply_rows(
            xq,
            scale,
            weight,
            bias,
            out_dtype,
            accumulate=self._accumulation(weight.k),
            tma=chosen.tma,
            programs=self.place(weight.device).multiprocessors,
            block_m=chosen.block_m,
            block_n=chosen.block_n,
            block_k=chosen.block_k,
            warps=chosen.warps,
            stages=chosen.stages,
        )

    def _blocks(
        self,
        x: torch.Tensor,
        weight: Prepared,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        chosen: Plan,
    ) -> torch.Tensor:
        from .triton_kernels import block

        # Many tokens are quantized once, not again by the programs of every tile of N.
        xq, scale = (x, None) if x.shape[0] <= 64 else _quantize(x, weight, "block")
        return block.multiply_blocks(
            xq,
            scale,
            weight,
            bias,
            out_dtype,
            ue8m0=weight.scheme.scale_format == "ue8m0",
            block_m=chosen.block_m,
            block_n=chosen.block_n,
            splits=chosen.splits,
            warps=chosen.warps,
            stages=chosen.stages,
        )

    def _library(
        self,
        x: torch.Tensor,
        weight: Prepared,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        chosen: Plan,
    ) -> torch.Tensor:
        kind = dispatch.kind_of(weight, native=True)
        rows = (
            -x.shape[0] % 4 if kind == "block" else 0
        )  # cuBLASLt's block product takes 4 tokens at a time, vllm#49932
        padded = F.pad(x, (0, 0, 0, rows)) if rows else x
        xq, scale = _quantize(padded, weight, kind)
        fast = self._accumulation(weight.k) == "fast"
        multiply = triton_library.multiply_blocks if kind == "block" else triton_library.multiply_rows
        y = multiply(xq, scale, weight, bias, out_dtype, fast=fast)
        return y[: x.shape[0]] if rows else y

    def _dense(
        self,
        x: torch.Tensor,
        weight: Prepared,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        chosen: Plan,
    ) -> torch.Tensor:
        from .triton_kernels import w8a16

        w = w8a16.dense(weight, x.dtype, native=self.place(weight.device).decodes)
        return F.linear(x, w, None if bias is None else bias.to(x.dtype)).to(out_dtype)


_Path = Callable[[TritonEngine, torch.Tensor, Prepared, "torch.Tensor | None", torch.dtype, Plan], torch.Tensor]
_PATHS: Mapping[str, _Path] = MappingProxyType(
    {
        "vectors": TritonEngine._vectors,
        "tokens": TritonEngine._tokens,
        "rows": TritonEngine._rows,
        "blocks": TritonEngine._blocks,
        "library": TritonEngine._library,
        "dense": TritonEngine._dense,
    }
)


@cache
def installed() -> tuple[int, int] | None:
    """Triton's (major, minor), without importing it; None if it is not installed under any of its names."""
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            major, minor = metadata.version(name).split(".")[:2]
        except metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return None


@cache
def place_of(device: torch.device) -> Place:
    """What of this device decides; asks the driver once."""
    properties = torch.cuda.get_device_properties(device)
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return place(
        (properties.major, properties.minor),
        card=properties.name,
        multiprocessors=properties.multi_processor_count,
        cuda=(int(major), int(minor)),
    )


def _quantize(x: torch.Tensor, weight: Prepared, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton_kernels import quantize

    ue8m0 = weight.scheme.scale_format == "ue8m0"
    if kind == "block":
        return quantize.quantize_groups(x, _rounding(None, ue8m0))
    return quantize.quantize_rows(x, _rounding(weight.input_scale if weight.scheme.static else None, ue8m0))


def _rounding(static: torch.Tensor | None, ue8m0: bool) -> Rounding:
    from .triton_kernels import quantize

    return quantize.PLAIN if static is None and not ue8m0 else quantize.Rounding(static=static, ue8m0=ue8m0)
