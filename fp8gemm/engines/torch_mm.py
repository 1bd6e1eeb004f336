"""torch's own FP8 products, ``torch.nn.functional.scaled_mm`` and its predecessor ``torch._scaled_mm``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from ..numerics import expand_scale, quantize
from ..scaled import BLOCK_128, GROUP_128, ROW, TENSOR, ScaledTensor, Scheme
from .base import Engine, Machine, MatmulSpec, PackedWeight, major_minor

ALIGNMENT = 16  # multiple of N and K for every operand on CUDA (torch's ScaledBlas.cpp)
_ACCELERATORS = ("cuda", "rocm", "xpu", "mps")
_FNUZ = torch.float8_e4m3fnuz

TORCH = major_minor(torch.__version__)
# Row scales on a CPU: torch 2.10 fails an internal assertion, and 2.13 supports them; 2.11 and 2.12 were not tested.
CPU_ROWS = (2, 13)


@dataclass(frozen=True, kw_only=True)
class TorchCpu:
    """Why torch multiplies no FP8 on this CPU; empty if it does.

    torch 2.13 hands the product to oneDNN where the CPU has AMX, and oneDNN refuses it if ``ONEDNN_MAX_CPU_ISA`` holds
    it down to less.
    """

    error: str = ""

    def __str__(self) -> str:
        return f"torch._scaled_mm fails: {self.error}" if self.error else "torch._scaled_mm works"


class TorchEngine(Engine):
    """Tensor, row and 128x128-block scaling through torch; N and K are padded with zeros, to 16 or to whole blocks.

    Block scaling needs an H100 or H200 and CUDA 12.9. AMD's gfx942 multiplies e4m3fnuz, so operands are rounded to
    e4m3fn as everywhere and then converted, which gives the same products. On a CPU torch takes 24 ms to 9 s per call,
    so ``auto`` never chooses it there; requested by name it runs, for tests. Weight-only schemes are not supported.
    """

    name = "torch"
    tolerance = 8e-3  # the tensor cores' 14-bit accumulator, and rounding to bfloat16
    traceable = True

    def probe(self, device: torch.device, machine: Machine) -> TorchCpu | None:
        if device.type != "cpu":
            return None
        codes = torch.zeros(ALIGNMENT, ALIGNMENT, dtype=torch.float8_e4m3fn, device=device)
        one = torch.ones(1, dtype=torch.float32, device=device)
        try:
            torch._scaled_mm(codes, codes.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        except RuntimeError as error:
            return TorchCpu(error=str(error).partition(". ")[0])
        return TorchCpu()

    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        reasons = [*_rejects_scheme(spec.scheme, machine), *_rejects_machine(machine)]
        if spec.experts:
            reasons += _rejects_grouped(spec, machine)
        if spec.compute_dtype == torch.float64:
            reasons.append("returns bfloat16, float16 or float32, not float64")
        if spec.weight_dtype != torch.float8_e4m3fn:
            reasons.append(f"multiplies e4m3 by e4m3, found weights in {spec.weight_dtype}")
        return reasons

    def prepare(self, weight: ScaledTensor, scheme: Scheme, *, input_scale: torch.Tensor | None = None) -> PackedWeight:
        n, k = weight.shape
        # torch 2.13's shape check expects whole blocks of N, and whole groups of K in the scales of activations.
        multiple = 128 if scheme.weight == BLOCK_128 else ALIGNMENT
        data = padded(weight.data, multiple, multiple)
        scale = weight.scale
        if scheme.weight == BLOCK_128:
            w_scale = block_scales(scale)
        else:
            row_scale = scale
            if scheme.weight.by_row:
                rows = expand_scale(scale, scheme.weight, weight.shape)
                row_scale = F.pad(rows, (0, 0, 0, -n % ALIGNMENT), value=1.0)
            if takes_fnuz(weight.device):
                data, row_scale = to_fnuz(data), 2 * row_scale
            w_scale = row_scale.t().contiguous()
        return PackedWeight(
            engine=self.name,
            scheme=scheme,
            n=n,
            k=k,
            data=data,
            scale=scale,
            input_scale=input_scale,
            extra={"w": data.t(), "w_scale": w_scale},
        )

    def restore(self, packed: PackedWeight) -> ScaledTensor:
        """The plain weight, bit for bit; except, on gfx942, the signs of zeros and NaN, which e4m3fnuz does not
        have."""
        data = cropped(packed)
        if data.dtype == _FNUZ:
            data = from_fnuz(data)
        return ScaledTensor(data, packed.scale, packed.scheme.weight)

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, weight.n, dtype=out_dtype)
        if weight.scheme.activation == GROUP_128:
            y = self._block(x, weight, out_dtype)
        else:
            y = self._row(x, weight, out_dtype)
        y = y[: x.shape[0], : weight.n]
        return y if bias is None else y + bias.to(out_dtype)

    def prepare_stack(self, weight: ScaledTensor, scheme: Scheme) -> PackedWeight:
        experts, n, k = weight.shape
        data = padded(weight.data, ALIGNMENT, ALIGNMENT)
        rows = expand_scale(weight.scale, scheme.weight, weight.shape)
        scale = F.pad(rows.squeeze(-1), (0, -n % ALIGNMENT), value=1.0)
        return PackedWeight(
            engine=self.name,
            scheme=scheme,
            n=n,
            k=k,
            data=data,
            scale=weight.scale,
            extra={"w": data.transpose(-2, -1), "w_scale": scale},
            experts=experts,
        )

    def restore_stack(self, packed: PackedWeight) -> ScaledTensor:
        return ScaledTensor(cropped(packed), packed.scale, packed.scheme.weight)

    def grouped(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        ends: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        w, w_scale = weight.extra["w"], weight.extra["w_scale"]
        xq = quantize(F.pad(x, (0, -weight.k % ALIGNMENT)), ROW)
        return multiply_grouped(xq.data, xq.scale, (w, w_scale), weight, ends, bias, out_dtype)

    def _row(self, x: torch.Tensor, weight: PackedWeight, out_dtype: torch.dtype) -> torch.Tensor:
        scheme = weight.scheme
        assert scheme.activation is not None
        xq = quantize(x, scheme.activation, scale=weight.input_scale if scheme.static else None)
        w, w_scale = weight.extra["w"], weight.extra["w_scale"]
        x_scale = xq.scale
        if x_scale.numel() == 1 and w_scale.numel() > 1:
            x_scale = x_scale.expand(x.shape[0], 1).contiguous()
        elif w_scale.numel() == 1 and x_scale.numel() > 1:
            w_scale = w_scale.expand(1, w.shape[1]).contiguous()
        data = F.pad(xq.data.view(torch.uint8), (0, -weight.k % ALIGNMENT)).view(xq.data.dtype)
        if w.dtype == _FNUZ:
            data, x_scale = to_fnuz(data), 2 * x_scale
        card = x.device.type != "cpu"
        hip = w.dtype == _FNUZ or (torch.version.hip is not None and card)
        asked = out_dtype
        if w_scale.numel() > 1 and hip:  # with row scales hipBLASLt returns bfloat16 only (ScaledBlas.cpp)
            asked = torch.bfloat16
        elif w_scale.numel() > 1 and card:
            asked = rows_dtype(out_dtype)
        y = torch._scaled_mm(
            data,
            w,
            scale_a=x_scale,
            scale_b=w_scale,
            out_dtype=asked,
            use_fast_accum=card and weight.fast,
        )
        return y.to(out_dtype)

    def _block(self, x: torch.Tensor, weight: PackedWeight, out_dtype: torch.dtype) -> torch.Tensor:
        w, w_scale = weight.extra["w"], weight.extra["w_scale"]
        # cuBLASLt needs a multiple of 4 tokens (vllm#49932); the caller removes the rows of zeros.
        xq = quantize(F.pad(x, (0, w.shape[0] - weight.k, 0, -x.shape[0] % 4)), GROUP_128)
        return multiply_blocks(xq.data, w, xq.scale.t().contiguous().t(), w_scale).to(out_dtype)

    def kernel(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> str:
        return "scaled_mm block" if weight.scheme.activation == GROUP_128 else "scaled_mm"


def rows_dtype(out_dtype: torch.dtype, *, bias: bool = False) -> torch.dtype:
    """The dtype to ask CUDA's row-wise products for; the additional rounding to bfloat16 is smaller than FP8's error.

    torch's CUTLASS kernels return 16-bit floats only, and before torch 2.14 write bfloat16's bits where float16 is
    asked for without a bias (RowwiseScaledMM.cu, pytorch#187569).
    """
    wrong = out_dtype == torch.float16 and not bias and TORCH < (2, 14)
    return torch.bfloat16 if wrong or out_dtype == torch.float32 else out_dtype


def multiply_rows(
    xq: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    fast: bool,
) -> torch.Tensor:
    """CUDA's row-wise product of e4m3 tokens and ``w [K, N]``, with scales ``[M, 1]`` and ``[1, N]``."""
    asked = rows_dtype(out_dtype, bias=bias is not None)
    y = torch._scaled_mm(xq, w, x_scale, w_scale, bias=bias, out_dtype=asked, use_fast_accum=fast)
    return y.to(out_dtype)


def multiply_blocks(xq: torch.Tensor, w: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """torch's product (cuBLASLt, always precise) of e4m3 tokens and ``w [K, N]``, with scales in its layout;
    bfloat16."""
    return F.scaled_mm(
        xq,
        w,
        scale_a=x_scale,
        scale_recipe_a=F.ScalingType.BlockWise1x128,
        scale_b=w_scale,
        scale_recipe_b=F.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def multiply_grouped(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    stack: tuple[torch.Tensor, torch.Tensor],
    weight: PackedWeight,
    ends: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """torch's product of e4m3 tokens ``[T, K]`` and ``stack``: weights ``[E, K, N]`` and scales ``[E, N]``."""
    w, w_scale = stack
    y = torch._scaled_grouped_mm(
        xq, w, x_scale.reshape(-1), w_scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=weight.fast
    )[:, : weight.n]
    token = torch.arange(xq.shape[0], device=xq.device, dtype=ends.dtype)
    if bias is not None:
        expert = torch.searchsorted(ends, token, right=True).clamp_(max=weight.experts - 1)
        y = y + bias[expert].to(y.dtype)
    # torch does not write rows past the last end.
    return torch.where((token < ends[-1]).unsqueeze(1), y, 0).to(out_dtype)


def padded(data: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """FP8 codes ``[..., N, K]``, contiguous, padded with zeros to multiples of ``rows`` and ``cols``."""
    n, k = data.shape[-2:]
    if n % rows == 0 and k % cols == 0:
        return data.contiguous()
    return F.pad(data.view(torch.uint8), (0, -k % cols, 0, -n % rows)).view(data.dtype)


def cropped(packed: PackedWeight) -> torch.Tensor:
    """The codes ``[..., n, k]`` without the padding of ``padded``."""
    return packed.data[..., : packed.n, : packed.k].contiguous()


@cache
def takes_fnuz(device: torch.device) -> bool:
    """Whether the device is AMD's gfx942 (MI300), which multiplies e4m3fnuz only; queries the driver once."""
    if device.type != "cuda" or torch.version.hip is None:
        return False
    return str(torch.cuda.get_device_properties(device).gcnArchName).startswith("gfx942")


def to_fnuz(data: torch.Tensor) -> torch.Tensor:
    """e4m3fn codes reinterpreted as e4m3fnuz, where they mean half the value: the scale doubles, exactly.

    e4m3fnuz has an exponent bias of 8 instead of 7, a single zero, and a single NaN, whose code is e4m3fn's -0.
    """
    code = data.view(torch.uint8)
    positive = torch.where(code == 0x80, 0, code)
    return torch.where(code & 0x7F == 0x7F, 0x80, positive).view(_FNUZ)


def from_fnuz(data: torch.Tensor) -> torch.Tensor:
    """The e4m3fn codes before ``to_fnuz``; -0 and the negative NaN come back as 0 and NaN."""
    code = data.view(torch.uint8)
    return torch.where(code == 0x80, 0x7F, code).view(torch.float8_e4m3fn)


def block_scales(scale: torch.Tensor) -> torch.Tensor:
    """Scales ``[..., N/128, K/128]`` in cuBLASLt's layout: ``[K/128 rounded up to 4, N/128]``, columns contiguous."""
    return F.pad(scale, (0, -scale.shape[-1] % 4)).transpose(-2, -1)


def _rejects_scheme(scheme: Scheme, machine: Machine) -> list[str]:
    pair = (scheme.weight, scheme.activation)
    if (scheme.weight == TENSOR or scheme.weight.by_row) and scheme.activation in (TENSOR, ROW):
        if machine.device == "cpu" and pair != (TENSOR, TENSOR) and machine.torch_version < CPU_ROWS:
            found = ".".join(map(str, machine.torch_version))
            return [f"on a CPU torch before 2.13 scales per tensor only, found torch {found} and {scheme}"]
        return []
    if pair != (BLOCK_128, GROUP_128):
        return [f"scales per tensor, per row, or 128x128 with 1x128 activations; found {scheme}"]
    if machine.device == "rocm":
        return ["on rocm torch scales per tensor and per row only, and Triton's block products need cuda"]
    if machine.device == "cuda" and machine.capability == (9, 0) and (machine.cuda_version or (0, 0)) >= (12, 9):
        return []
    where = f"{machine.device} {machine.name}".strip()
    return [f"block scaling needs compute capability 9.0 and CUDA 12.9, found {where} {_cuda(machine)}"]


def _rejects_machine(machine: Machine) -> list[str]:
    reasons = []
    if machine.device not in (*_ACCELERATORS, "cpu"):
        reasons.append(f"runs on {', '.join(_ACCELERATORS)} and cpu, found {machine.device}")
    if machine.device == "cuda" and (machine.capability or (0, 0)) < (8, 9):
        reasons.append(f"needs compute capability 8.9 or newer, found {_cuda(machine)}")
    if machine.device == "mps" and machine.torch_version < (2, 15):
        reasons.append(f"needs torch 2.15 on mps, found {'.'.join(map(str, machine.torch_version))}")
    if (found := machine.facts("torch", TorchCpu)) is not None and found.error:
        reasons.append(f"torch._scaled_mm fails on this CPU: {found.error}")
    return reasons


def _rejects_grouped(spec: MatmulSpec, machine: Machine) -> list[str]:
    """``scaled_grouped_mm`` of torch 2.11: row-wise CUTLASS kernels with bfloat16 output (torch's GroupedBlas.cpp).

    They are made for Hopper: elsewhere torch refuses them or they trap, after which the process has no GPU
    (pytorch#187095, pytorch#194227).
    """
    reasons = []
    if machine.device != "cuda" or machine.capability != (9, 0):
        found = f"{machine.device} {machine.name}".strip()
        reasons.append(f"grouped products need compute capability 9.0, found {found} {_cuda(machine)}")
    if not spec.scheme.weight.by_row or spec.scheme.activation != ROW:
        reasons.append(f"grouped products need row scales for weights and tokens, found {spec.scheme}")
    return reasons


def _cuda(machine: Machine) -> str:
    capability = "unknown" if machine.capability is None else "{}.{}".format(*machine.capability)
    cuda = "none" if machine.cuda_version is None else "{}.{}".format(*machine.cuda_version)
    return f"(compute capability {capability}, CUDA {cuda})"
