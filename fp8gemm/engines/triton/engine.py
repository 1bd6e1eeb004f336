"""The Triton engine: any N and K, every scheme, compute capability 8.0 and newer; chooses a kernel by M."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import metadata

import torch

from ...scaled import GROUP_128, ROW, Granularity, ScaledTensor, Scheme
from ..activations import group_scales
from ..base import Engine, Machine, MatmulSpec, PackedWeight, Trial, major_minor
from ..scaled_mm import multiplies_rows, multiply_grouped
from . import library
from . import table as tables
from .paths import PATHS, Product, quantize
from .plan import AS_THEY_ARE_UP_TO, INLINE_UP_TO, Place, Plan, grouped_plan, place, precise, quantized_plan

OLDEST_TRITON = (3, 6)
# N and K of the weights whose plans prove a small weight's products: with few tiles, which a long K splits for more
# tokens, and with too many to split them.
STAND_INS = ((4096, 4096), (4096, 16384), (32768, 4096))
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Triton:
    """The installed Triton: its (major, minor) version."""

    version: tuple[int, int]

    def __str__(self) -> str:
        return "{}.{}".format(*self.version)


class TritonEngine(Engine):
    """Weight-only products in one launch for few tokens, FP8 products for many.

    Activations are quantized per token under tensor and row schemes, only beyond 64 tokens; in groups of 128 features
    under the block scheme; and never before compute capability 8.9, which does not multiply FP8.
    """

    name = "triton"
    tolerance = 8e-3  # as torch's FP8 products: the 14-bit accumulator, and rounding to bfloat16

    def prepare(self, weight: ScaledTensor, scheme: Scheme, *, input_scale: torch.Tensor | None = None) -> PackedWeight:
        if weight.device.type == "cuda":
            from .counters import reserve

            reserve(weight.device)
        layout = _layout(weight, scheme, input_scale)
        rounding = self._rounding(layout)
        few = INLINE_UP_TO if rounding == GROUP_128 else AS_THEY_ARE_UP_TO
        return replace(layout, apart=rounding, few=few)

    def prepare_stack(self, weight: ScaledTensor, scheme: Scheme) -> PackedWeight:
        return replace(_layout(weight, scheme), experts=weight.shape[0]).split()

    def probe(self, device: torch.device, machine: Machine) -> Triton | None:
        return installed()

    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        found = machine.facts(self.name, Triton)
        reasons = []
        if machine.device != "cuda":
            reasons.append(f"runs on cuda only, found {machine.device}")
        elif (machine.capability or (0, 0)) < (8, 0):
            capability = "unknown" if machine.capability is None else "{}.{}".format(*machine.capability)
            reasons.append(f"needs compute capability 8.0 or newer, found {capability}")
        if found is None:
            reasons.append("Triton is not installed")
        elif found.version < OLDEST_TRITON:
            reasons.append(f"needs Triton {Triton(OLDEST_TRITON)} or newer, found {found}")
        if spec.compute_dtype not in _DTYPES:
            reasons.append(
                f"returns bfloat16, float16 or float32, not {str(spec.compute_dtype).removeprefix('torch.')}"
            )
        if (spec.scheme.weight.cols or 16) % 16:
            reasons.append(f"supports scales along K in multiples of 16, found {spec.scheme.weight}")
        return reasons

    def look_up(self, weight: ScaledTensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        usable = weight.device.type == "cuda" and installed() is not None and dtype in _DTYPES
        return _looked_up(weight, ids, dtype) if usable and looks_up(weight.device) else None

    def place(self, device: torch.device) -> Place:
        """The properties of a GPU that decide which kernel runs."""
        return place_of(device)

    def plan(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> Plan:
        """The kernel for ``m`` tokens, and its tiles."""
        where = self.place(weight.device)
        kind = tables.kind_of(weight, native=where.native)
        cols = weight.scheme.weight.cols or 0
        chosen = tables.plan(where, kind, weight.n, weight.k, m, wide=dtype == torch.float32, scale_cols=cols)
        return chosen if weight.fast else precise(where, chosen)

    def rounds(self, m: int, weight: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> Scheme:
        """The scheme that is really applied to ``m`` tokens: weight-only, or the quantization of the kernel chosen."""
        path = self.plan(max(m, 1), weight, dtype).path
        if path in ("vectors", "tokens", "dense"):
            return weight.scheme.weight_only()
        activation = self._rounding(weight)
        return replace(weight.scheme, activation=activation)

    def _rounding(self, weight: PackedWeight) -> Granularity | None:
        """The granularity with which this weight's FP8 products quantize activations; None if there are none."""
        kind = tables.kind_of(weight, native=self.place(weight.device).native)
        if kind == "block":
            return GROUP_128
        if kind == "row":
            return weight.scheme.activation if weight.scheme.static else ROW
        return None

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        m = x.shape[0]
        if m == 0 or weight.n == 0 or weight.k == 0:
            return _nothing(m, weight, bias, out_dtype)
        return self.run(self.plan(m, weight, x.dtype), m, (x, None), weight, bias, out_dtype)

    def run(
        self,
        chosen: Plan,
        m: int,
        tokens: tuple[torch.Tensor, torch.Tensor | None],
        weight: PackedWeight,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """``linear`` by one plan; ``tokens`` are ``x [M, K]`` and None, or quantized already, with their scales."""
        x, x_scale = tokens
        product = Product(
            m=m,
            x=x,
            x_scale=x_scale,
            weight=weight,
            bias=bias,
            out_dtype=out_dtype,
            plan=chosen,
            where=self.place(weight.device),
        )
        return PATHS[chosen.path](product)

    def bind(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        from . import replay

        fixed = [weight.data, weight.scale, weight.input_scale, *weight.extra.values(), bias]
        return replay.record(
            lambda tokens: self.linear(tokens, weight, bias, out_dtype),
            x.view(-1, weight.k),
            tuple(tensor for tensor in fixed if tensor is not None),
            (*x.shape[:-1], weight.n),
        )

    def gated(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor | None:
        m = gate.shape[0]
        chosen = self.plan(m, weight, gate.dtype)
        if not _rounds_first(chosen, m):
            return None
        kind = tables.kind_of(weight, native=self.place(weight.device).native)
        tokens = quantize(gate, weight, kind, up=up, library=chosen.path == "library")
        return self.run(chosen, m, tokens, weight, bias, out_dtype)

    def linear_quantized(
        self, x: ScaledTensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        m = x.shape[0]
        if m == 0 or weight.n == 0 or weight.k == 0:
            return _nothing(m, weight, bias, out_dtype)
        where = self.place(weight.device)
        kind = tables.kind_of(weight, native=where.native)
        chosen = quantized_plan(where, kind, self.plan(m, weight, out_dtype), weight.n, weight.k, m)
        scale = group_scales(x.scale) if kind == "block" and x.scale.stride(0) != 1 else x.scale
        return self.run(chosen if weight.fast else precise(where, chosen), m, (x.data, scale), weight, bias, out_dtype)

    def loses(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> bool:
        return self.plan(m, weight, dtype).kept_is_faster

    def grouped(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        ends: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        from .kernels import grouped

        tokens = x.shape[0]
        if tokens == 0 or weight.n == 0 or weight.k == 0 or weight.experts == 0:
            return x.new_zeros(tokens, weight.n, dtype=out_dtype)
        where = self.place(weight.device)
        kind = tables.kind_of(weight, native=where.native)
        cols = weight.scheme.weight.cols or 0
        wide = x.dtype == torch.float32
        chosen = grouped_plan(where, kind, weight.n, weight.k, tokens, weight.experts, wide=wide, scale_cols=cols)
        scale = None
        if chosen.quantize_first:
            x, scale = quantize(x, weight, kind, library=chosen.mode == "library")
        if chosen.mode == "library" and scale is not None:
            stack = weight.extra["w"], weight.extra["w_scale"].squeeze(-2)
            return multiply_grouped(x, scale, stack, weight, ends, bias, out_dtype)
        return grouped.multiply_grouped(
            x,
            scale,
            weight,
            ends,
            None if bias is None else bias.contiguous(),
            out_dtype,
            mode=chosen.mode,
            native=where.native,
            ue8m0=weight.scheme.scale_format == "ue8m0",
            promotion="none" if weight.fast else where.promotion,
            weight_first=where.weight_first,
            block_m=chosen.block_m,
            block_n=chosen.block_n,
            block_k=chosen.block_k,
            warps=chosen.warps,
            stages=chosen.stages,
        )

    def trials(self, weight: PackedWeight, dtype: torch.dtype) -> Iterator[Trial]:
        """One by each kind of plan that weights with this alignment have: its path, with and without TMA or splits."""
        seen = set()
        for (n, k), m in itertools.product(STAND_INS, (1, 4, 16, 64, 96, 256, 1024)):
            large = replace(weight, n=n + weight.n % 128, k=k + weight.k % 128)
            chosen = self.plan(m, large, dtype)
            kind = (chosen.path, chosen.splits > 1, chosen.tma, _rounds_first(chosen, m))
            if kind not in seen:
                seen.add(kind)
                yield Trial(f"kernel {chosen.path}", min(m, 130), partial(self._by_plan, chosen, weight, dtype))

    def _by_plan(
        self, chosen: Plan, weight: PackedWeight, dtype: torch.dtype, x: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        return self.run(chosen, x.shape[0], (x, None), weight, bias, dtype)

    def kernel(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> str:
        return f"triton {self.plan(max(m, 1), weight, dtype).path}"


def _layout(weight: ScaledTensor, scheme: Scheme, input_scale: torch.Tensor | None = None) -> PackedWeight:
    """A weight, or a stack, in plain row-major layout, with the views that torch's products need."""
    weight = replace(weight, data=weight.data.contiguous(), scale=weight.scale.contiguous())
    n, k = weight.shape[-2:]
    return PackedWeight(
        engine=TritonEngine.name,
        scheme=scheme,
        n=n,
        k=k,
        data=weight.data,
        scale=weight.scale,
        input_scale=input_scale,
        extra=library.operands(weight),
        dtypes=_DTYPES,
    )


def _looked_up(weight: ScaledTensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from .kernels.lookup import look_up  # imports Triton

    rows, cols = weight.granularity.block(weight.shape)
    native = place_of(weight.device).native
    y: torch.Tensor = look_up(ids, weight.data, weight.scale, rows, cols, dtype, native=native)
    return y


def _nothing(m: int, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """The result for M, N or K of 0."""
    y = torch.zeros(m, weight.n, dtype=out_dtype, device=weight.device)
    return y if bias is None else y + bias.to(out_dtype)


def _rounds_first(chosen: Plan, m: int) -> bool:
    """Whether activations are quantized by a separate launch."""
    return chosen.path in ("rows", "library") or (chosen.path == "blocks" and m > INLINE_UP_TO)


@cache
def installed() -> Triton | None:
    """The installed Triton's version, without importing it; None if it is not installed under any of its names."""
    for name in ("triton", "pytorch-triton", "triton-windows"):
        with suppress(metadata.PackageNotFoundError):
            return Triton(major_minor(metadata.version(name)))
    return None


@cache
def looks_up(device: torch.device) -> bool:
    """Whether the kernel for lookups runs on this device and returns the right rows; compiles and runs it once."""
    table = torch.arange(1, 9, dtype=torch.float32, device=device)[:, None].expand(8, 256)
    weight = ScaledTensor(
        table.to(torch.float8_e4m3fn), torch.full((8, 1), 2.0, dtype=torch.float32, device=device), ROW
    )
    ids = torch.tensor([7, 0, 5], dtype=torch.int64, device=device)
    try:
        return _looked_up(weight, ids, torch.float32).equal(2 * table[ids])
    except Exception:  # whatever Triton, its compiler or the driver may raise
        return False


@cache
def place_of(device: torch.device) -> Place:
    """The properties of this device; queries the driver once."""
    properties = torch.cuda.get_device_properties(device)
    found = place(
        (properties.major, properties.minor),
        card=properties.name,
        multiprocessors=properties.multi_processor_count,
        cuda=major_minor(torch.version.cuda or "0.0"),
    )
    if "row" in found.library and not multiplies_rows(device):
        found = replace(found, library=found.library - {"row"})
    return found
