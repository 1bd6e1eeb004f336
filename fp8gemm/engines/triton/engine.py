"""The Triton engine: any N and K, every scheme, compute capability 8.0 and newer; chooses a kernel by M."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata

import torch

from ...errors import UnsupportedError
from ...scaled import GROUP_128, ROW, SCHEMES, Granularity, ScaledTensor, Scheme
from ..base import Engine, Machine, MatmulSpec, PackedWeight, major_minor
from ..torch_mm import multiply_grouped
from . import library
from . import table as tables
from .paths import PATHS, Product, quantize
from .plan import AS_THEY_ARE_UP_TO, INLINE_UP_TO, Place, Plan, grouped_plan, place, precise, quantized_plan

OLDEST_TRITON = (3, 6)
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
        _refuse_broken(weight.device)
        layout = _layout(weight, scheme, input_scale)
        rounding = self._rounding(layout)
        few = INLINE_UP_TO if rounding == GROUP_128 else AS_THEY_ARE_UP_TO
        return replace(layout, apart=rounding, few=few)

    def prepare_stack(self, weight: ScaledTensor, scheme: Scheme) -> PackedWeight:
        _refuse_broken(weight.device)
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
        return _looked_up(weight, ids, dtype) if usable and not failure(weight.device) else None

    def place(self, device: torch.device) -> Place:
        """The properties of a GPU that decide which kernel runs."""
        return place_of(device)

    def plan(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> Plan:
        """The kernel for ``m`` tokens, and its tiles."""
        where = self.place(weight.device)
        kind = tables.kind_of(weight, native=where.native)
        cols = weight.scheme.weight.cols or 0
        chosen = tables.plan(where, kind, weight.n, weight.k, m, wide=dtype == torch.float32, scale_cols=cols)
        return chosen if weight.fast else precise(chosen)

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
        return self._run(self.plan(m, weight, x.dtype), x, None, weight, bias, out_dtype)

    def _run(
        self,
        chosen: Plan,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Runs one plan; ``x`` is quantized already if ``x_scale`` is given."""
        where = self.place(weight.device)
        product = Product(x=x, x_scale=x_scale, weight=weight, bias=bias, out_dtype=out_dtype, plan=chosen, where=where)
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
        return self._run(chosen, *quantize(gate, weight, kind, up=up), weight, bias, out_dtype)

    def linear_quantized(
        self, x: ScaledTensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        m = x.shape[0]
        if m == 0 or weight.n == 0 or weight.k == 0:
            return _nothing(m, weight, bias, out_dtype)
        where = self.place(weight.device)
        kind = tables.kind_of(weight, native=where.native)
        chosen = quantized_plan(where, kind, self.plan(m, weight, out_dtype), weight.n, weight.k, m)
        # M-major, as quantize_groups returns it; torch's quantization does not.
        scale = x.scale.t().contiguous().t() if kind == "block" else x.scale
        return self._run(chosen if weight.fast else precise(chosen), x.data, scale, weight, bias, out_dtype)

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
            x, scale = quantize(x, weight, kind)
        if chosen.mode == "library" and scale is not None:
            stack = weight.extra["w"], weight.extra["w_scale"].squeeze(-2)
            scale = scale.expand(tokens, 1).contiguous()  # a static scale is shared by all tokens
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
            accumulate="fast" if weight.fast else "precise",
            block_m=chosen.block_m,
            block_n=chosen.block_n,
            block_k=chosen.block_k,
            warps=chosen.warps,
            stages=chosen.stages,
        )

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


def _refuse_broken(device: torch.device) -> None:
    """Raises UnsupportedError on a GPU where fp8gemm's kernels fail."""
    if device.type == "cuda" and (problem := failure(device)):
        raise UnsupportedError(problem)


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
def failure(device: torch.device) -> str:
    """Why the kernels cannot be used on this device; empty if they can. Compiles and checks one kernel per path.

    Triton needs a C compiler at run time and a driver that supports its code; where either fails, ``auto`` tries the
    next engine. Takes seconds, once per machine, as Triton caches what it compiled on disk.
    """
    engine, row = TritonEngine(), SCHEMES["row"]
    generator = torch.Generator(device="cpu").manual_seed(0)
    drawn = torch.randint(-3, 4, (2, 128, 256), generator=generator, dtype=torch.int64, device="cpu")
    w, x = drawn.to(device)
    weight = ScaledTensor(w.to(torch.float8_e4m3fn), torch.ones(128, 1, dtype=torch.float32, device=device), ROW)
    x[:, 0] = 448  # so that every token's scale is 1 and its rounding is exact
    layout = _layout(weight, row)
    expected = (x.double() @ w.double().t()).to(torch.bfloat16)
    for m in (1, 16, 128):
        try:
            y = engine.linear(x[:m].to(torch.bfloat16), layout, None, torch.bfloat16)
        except Exception as error:  # whatever Triton, its compiler or the driver may raise
            return f"Triton's kernels fail here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not y.equal(expected[:m]):
            return f"Triton's kernel for {m} tokens computes wrong products here"
    ids = torch.tensor([127, 0, 5], dtype=torch.int64, device=device)
    if not _looked_up(weight, ids, torch.float32).equal(w[ids].to(torch.float32)):
        return "Triton's kernel for lookups returns wrong rows here"
    return ""


@cache
def place_of(device: torch.device) -> Place:
    """The properties of this device; queries the driver once."""
    properties = torch.cuda.get_device_properties(device)
    return place(
        (properties.major, properties.minor),
        card=properties.name,
        multiprocessors=properties.multi_processor_count,
        cuda=major_minor(torch.version.cuda or "0.0"),
    )
