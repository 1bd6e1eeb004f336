"""The CPU engine: compiled kernels, or plain torch, which decodes panels of the weight in cache and multiplies them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from .. import native
from ..numerics import expand_scale, nan_rows
from ..scaled import COMPUTE_DTYPES, ScaledTensor, Scheme
from .base import Machine, MatmulSpec, PackedWeight, WeightOnlyEngine
from .epilogue import scale_columns

# Elements of one decoded panel: 2 MiB of bfloat16, the L2 cache of current server cores. Measured with torch 2.13 on
# 2 cores at K = 4096: 128 rows are slower because of the overhead per call, 512 rows because they exceed the cache.
PANEL_ELEMENTS = 2**20


class CpuEngine(WeightOnlyEngine):
    """Weight-only: activations are not quantized, and weights are decoded exactly to their dtype.

    The compiled kernels are used where they are available; plain torch does the rest panel by panel: float64, e5m2, and
    everything if there is no compiler. With block scales and bfloat16 activations, plain torch first rounds the scaled
    weight to bfloat16, as a dequantized weight would be. It computes float16 in float32, because products of unscaled
    codes, up to 448 or 57344 each, exceed float16's range long before the scaled ones do.
    """

    name = "cpu"

    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        reasons = []
        if machine.device != "cpu":
            reasons.append(f"runs on cpu only, found {machine.device}")
        if spec.compute_dtype not in COMPUTE_DTYPES:
            reasons.append(f"computes in bfloat16, float16, float32 or float64, found {spec.compute_dtype}")
        return reasons

    def prepare(self, weight: ScaledTensor, scheme: Scheme, *, input_scale: torch.Tensor | None = None) -> PackedWeight:
        contiguous = ScaledTensor(weight.data.contiguous(), weight.scale.contiguous(), weight.granularity)
        packed = super().prepare(contiguous, scheme, input_scale=input_scale)
        library = _library(weight.data.dtype, torch.bfloat16)
        if library is not None:
            if native.plain(packed.data):
                _has_nans(library, packed.data)  # now rather than in the first product
            return packed
        return replace(packed, extra={"column_scale": _column_scale(weight, scheme)})

    def prepare_stack(self, weight: ScaledTensor, scheme: Scheme) -> PackedWeight:
        if _library(weight.data.dtype, torch.bfloat16) is None:
            return super().prepare_stack(weight, scheme)
        experts, n, k = weight.shape
        return PackedWeight(
            engine=self.name,
            scheme=self.effective(scheme),
            n=n,
            k=k,
            data=weight.data.contiguous(),
            scale=weight.scale.contiguous(),
            experts=experts,
        ).split()

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        library = _library(weight.data.dtype, x.dtype, x, weight.data, weight.scale, bias)
        if library is not None:
            y = x.new_empty(x.shape[0], weight.n)
            rows, cols = weight.scheme.weight.block((weight.n, weight.k))
            own = None if bias is None else bias.to(x.dtype)
            library.linear(x, weight.data, weight.scale, rows, cols, own, y, nans=_has_nans(library, weight.data))
            return y.to(out_dtype)
        wide = x.to(torch.float32) if x.dtype == torch.float16 else x
        y = torch.cat([_multiply(wide, panel) for panel in _panels(weight, wide.dtype)], dim=1)
        column_scale = weight.extra.get("column_scale")
        if column_scale is None:
            column_scale = _column_scale(ScaledTensor(weight.data, weight.scale, weight.scheme.weight), weight.scheme)
        return scale_columns(y, column_scale, bias).to(out_dtype)

    def bind(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        library = _library(weight.data.dtype, x.dtype, x, weight.data, weight.scale, bias)
        if library is None or out_dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
            return None
        # The result's shape with memory for one element: torch makes others like it faster than by shape and dtype.
        like = x.new_empty(1).expand(*x.shape[:-1], weight.n)
        flat = x.reshape(-1, weight.k)
        rows, cols = weight.scheme.weight.block((weight.n, weight.k))
        out = x.new_empty(flat.shape[0], weight.n)
        data = weight.data
        run = library.bind(flat, data, weight.scale, rows, cols, bias, out)
        # Compiled graphs may write to the bytes, which counts their version up.
        without_nans = None if _has_nans(library, data) else data._version

        def bound(x: torch.Tensor) -> torch.Tensor:
            y = torch.empty_like(like, memory_format=torch.contiguous_format)
            run(x.data_ptr(), y.data_ptr(), without_nans is None or data._version != without_nans)
            return y

        return bound

    def grouped(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        ends: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        library = _library(weight.data.dtype, x.dtype, x, weight.data, weight.scale, ends, bias)
        if library is None:
            return super().grouped(x, weight, ends, bias, out_dtype)
        y = x.new_empty(x.shape[0], weight.n)
        here = int(ends[-1])
        rows, cols = weight.scheme.weight.block((weight.n, weight.k))
        own = None if bias is None else bias.to(x.dtype)
        nans = _has_nans(library, weight.data)
        library.grouped(x[:here], weight.data, weight.scale, rows, cols, ends, own, y[:here], nans=nans)
        y[here:] = 0
        return y.to(out_dtype)

    def kernel(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> str:
        library = _loaded(weight.data.dtype, dtype)
        if library is None:
            return "torch panels"
        _, cols = weight.scheme.weight.block((weight.n, weight.k))
        return f"native {library.path_for(m, dtype, k=weight.k, cols=cols)}"


def _library(stored: torch.dtype, dtype: torch.dtype, *operands: torch.Tensor | None) -> native.Library | None:
    """The compiled kernels, if they are available and support these dtypes and operands."""
    return _loaded(stored, dtype) if native.plain(*operands) else None


def _loaded(stored: torch.dtype, dtype: torch.dtype) -> native.Library | None:
    """The compiled kernels, if they are available and support these dtypes."""
    return native.loaded() if stored == torch.float8_e4m3fn and dtype != torch.float64 else None


def _has_nans(library: native.Library, data: torch.Tensor) -> bool:
    """Whether a code of ``data`` may be NaN, looked for once per version of it; True where versions are not counted."""
    if data.is_inference():
        return True
    version = data._version
    known = data.__dict__.get("_fp8gemm_nans")
    if known is None or known[0] != version:
        known = data.__dict__["_fp8gemm_nans"] = version, library.has_nans(data)
    return bool(known[1])


def _column_scale(weight: ScaledTensor, scheme: Scheme) -> torch.Tensor:
    """The factor of each output column, float32 [N]: the row scales, or 1 where scales vary along K.

    The integer decoding turns NaN codes into ±480; this factor makes their whole column NaN, as a NaN in a row of
    ``nn.Linear``'s weight does.
    """
    n, _ = weight.shape
    per_row = weight.scale.shape[-1] == 1
    scale = expand_scale(weight.scale, scheme.weight, weight.shape).reshape(-1) if per_row else weight.scale.new_ones(1)
    poison = nan_rows(weight.data)
    return torch.where(poison, torch.nan, scale.expand(n))


def _panels(weight: PackedWeight, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The weight in ``dtype``, panel by panel, scaled only where scales vary along K; reuses one buffer."""
    rows_per_scale, _ = weight.scheme.weight.block((weight.n, weight.k))
    rows = max(1, PANEL_ELEMENTS // max(weight.k, 1))
    varies = weight.scale.shape[-1] > 1
    if varies:
        rows = max(1, rows // rows_per_scale) * rows_per_scale
    buffer = torch.empty(rows, weight.k, dtype=_decoded_bits(weight.data.dtype, dtype), device=weight.device)
    for start in range(0, weight.n, rows):
        data = weight.data[start : start + rows]
        panel = decode_panel(data, dtype, buffer[: data.shape[0]])
        if varies:
            first, last = start // rows_per_scale, -(-(start + data.shape[0]) // rows_per_scale)
            scale = expand_scale(weight.scale[first:last], weight.scheme.weight, data.shape)
            panel = (panel.to(torch.promote_types(dtype, torch.float32)) * scale).to(dtype)
        yield panel


def _decoded_bits(stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The integer dtype in which codes of ``stored`` are shifted to become ``dtype``."""
    wide = dtype in (torch.float32, torch.float64) and stored == torch.float8_e4m3fn
    return torch.int32 if wide else torch.int16


def decode_panel(data: torch.Tensor, dtype: torch.dtype, buffer: torch.Tensor) -> torch.Tensor:
    """The exact values of FP8 ``data [P, K]`` in ``dtype``, through an integer ``buffer [P, K]``; except NaN codes.

    An e4m3 code, sign-extended and shifted so that its exponent field is aligned with the float's, is a float that is
    too small by 2**120, for bfloat16 and float32 alike. One multiplication corrects this exactly, including subnormals;
    without it, bfloat16 products would flush those to zero. An e5m2 code is the upper byte of a float16.
    """
    buffer.copy_(data.view(torch.int8))
    if data.dtype == torch.float8_e5m2:
        return buffer.mul_(2**8).view(torch.float16).to(dtype)
    # Multiplying integers by a power of two is faster than shifting them in torch 2.13.
    if dtype == torch.bfloat16:
        return buffer.mul_(2**4).bitwise_and_(-0x7810).view(torch.bfloat16).mul_(2.0**120)
    panel = buffer.mul_(2**20).bitwise_and_(-0x78100000).view(torch.float32).mul_(2.0**120)
    return panel.to(dtype)


def _multiply(x: torch.Tensor, panel: torch.Tensor) -> torch.Tensor:
    """``x [M, K] @ panel.T``; a single token uses the matrix-vector product, which is twice as fast."""
    return torch.mv(panel, x[0]).unsqueeze(0) if x.shape[0] == 1 else F.linear(x, panel)
