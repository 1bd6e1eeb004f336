"""torch's own FP8 products, ``torch.nn.functional.scaled_mm`` and its predecessor ``torch._scaled_mm``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..quantize import expand_scale, quantize
from ..scaled import BLOCK_128, GROUP_128, ROW, TENSOR, ScaledTensor, Scheme
from .base import Engine, Machine, MatmulSpec, Prepared

ALIGNMENT = 16  # N and K of every operand on CUDA (torch's ScaledBlas.cpp)
_ACCELERATORS = ("cuda", "rocm", "xpu", "mps")


class TorchEngine(Engine):
    """Tensor, row and 128x128-block scaling through torch; N and K are padded to 16 with zeros.

    Block scaling needs an H100 or H200 and CUDA 12.9. On a CPU torch takes 24 ms to 9 s a call, so ``auto`` never
    chooses it there; named by the user it runs, for tests. Weight-only schemes are not what these products are.
    """

    name = "torch"
    tolerance = 8e-3  # the tensor cores' 14-bit accumulator in fast accumulation, beside the bfloat16 output
    traceable = True

    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        reasons = [*_rejects_scheme(spec.scheme, machine), *_rejects_machine(machine)]
        if spec.experts:
            reasons += _rejects_grouped(spec, machine)
        if spec.compute_dtype == torch.float64:
            reasons.append("gives bfloat16, float16 or float32, not float64")
        if spec.weight_dtype != torch.float8_e4m3fn:
            reasons.append(f"multiplies e4m3 by e4m3, found weights in {spec.weight_dtype}")
        return reasons

    def prepare(self, weight: ScaledTensor, scheme: Scheme, *, input_scale: torch.Tensor | None = None) -> Prepared:
        n, k = weight.shape
        data = weight.data.contiguous()
        scale = weight.scale
        if -n % ALIGNMENT or -k % ALIGNMENT:
            padded = F.pad(data.view(torch.uint8), (0, -k % ALIGNMENT, 0, -n % ALIGNMENT))
            data = padded.view(weight.data.dtype)
        extra: tuple[torch.Tensor, ...]
        if scheme.weight == BLOCK_128:
            extra = (data.t(), _block_scales(scale))
        else:
            row_scale = scale
            if scheme.weight.by_row:
                rows = expand_scale(scale, scheme.weight, weight.shape)
                row_scale = F.pad(rows, (0, 0, 0, -n % ALIGNMENT), value=1.0)
            extra = (data.t(), row_scale.t().contiguous())
        return Prepared(
            engine=self.name,
            scheme=scheme,
            n=n,
            k=k,
            data=data,
            scale=scale,
            input_scale=input_scale,
            extra=extra,
        )

    def restore(self, prepared: Prepared) -> ScaledTensor:
        data = prepared.data[: prepared.n, : prepared.k].contiguous()
        return ScaledTensor(data, prepared.scale, prepared.scheme.weight)

    def linear(
        self, x: torch.Tensor, weight: Prepared, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, weight.n, dtype=out_dtype)
        if weight.scheme.activation == GROUP_128:
            y = self._block(x, weight, out_dtype)
        else:
            y = self._row(x, weight, out_dtype)
        y = y[: x.shape[0], : weight.n]
        return y if bias is None else y + bias.to(out_dtype)

    def prepare_stack(self, weight: ScaledTensor, scheme: Scheme) -> Prepared:
        experts, n, k = weight.shape
        data = F.pad(weight.data.view(torch.uint8), (0, -k % ALIGNMENT, 0, -n % ALIGNMENT)).view(weight.data.dtype)
        rows = expand_scale(weight.scale, scheme.weight, weight.shape)
        scale = F.pad(rows.squeeze(-1), (0, -n % ALIGNMENT), value=1.0)
        return Prepared(
            engine=self.name,
            scheme=scheme,
            n=n,
            k=k,
            data=data,
            scale=weight.scale,
            extra=(data.transpose(-2, -1), scale),
            experts=experts,
        )

    def restore_stack(self, prepared: Prepared) -> ScaledTensor:
        data = prepared.data[:, : prepared.n, : prepared.k].contiguous()
        return ScaledTensor(data, prepared.scale, prepared.scheme.weight)

    def grouped(
        self,
        x: torch.Tensor,
        weight: Prepared,
        ends: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        w, w_scale = weight.extra
        xq = quantize(F.pad(x, (0, -weight.k % ALIGNMENT)), ROW)
        y = torch._scaled_grouped_mm(
            xq.data, w, xq.scale.reshape(-1), w_scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        )[:, : weight.n]
        token = torch.arange(x.shape[0], device=x.device, dtype=ends.dtype)
        if bias is not None:
            expert = torch.searchsorted(ends, token, right=True).clamp_(max=weight.experts - 1)
            y = y + bias[expert].to(y.dtype)
        # torch leaves rows past the last end unwritten.
        return torch.where((token < ends[-1]).unsqueeze(1), y, 0).to(out_dtype)

    def _row(self, x: torch.Tensor, weight: Prepared, out_dtype: torch.dtype) -> torch.Tensor:
        scheme = weight.scheme
        assert scheme.activation is not None
        xq = quantize(x, scheme.activation, scale=weight.input_scale if scheme.static else None)
        w, w_scale = weight.extra
        x_scale = xq.scale
        if x_scale.numel() == 1 and w_scale.numel() > 1:
            x_scale = x_scale.expand(x.shape[0], 1).contiguous()
        elif w_scale.numel() == 1 and x_scale.numel() > 1:
            w_scale = w_scale.expand(1, w.shape[1]).contiguous()
        data = F.pad(xq.data.view(torch.uint8), (0, -weight.k % ALIGNMENT)).view(xq.data.dtype)
        fast = x.device.type != "cpu"
        # torch 2.11's CUTLASS rowwise kernels give 16-bit floats only; one rounding to bfloat16 more is below FP8's.
        narrow = torch.bfloat16 if out_dtype == torch.float32 and fast and w_scale.numel() > 1 else out_dtype
        y = torch._scaled_mm(data, w, scale_a=x_scale, scale_b=w_scale, out_dtype=narrow, use_fast_accum=fast)
        return y.to(out_dtype)

    def _block(self, x: torch.Tensor, weight: Prepared, out_dtype: torch.dtype) -> torch.Tensor:
        # cuBLASLt takes 4 tokens at a time (vllm#49932); rows of zeros are cut off again by the caller.
        x = F.pad(x, (0, -weight.k % ALIGNMENT, 0, -x.shape[0] % 4))
        xq = quantize(x, GROUP_128)
        w, w_scale = weight.extra
        return F.scaled_mm(
            xq.data,
            w,
            scale_a=xq.scale.t().contiguous().t(),
            scale_recipe_a=F.ScalingType.BlockWise1x128,
            scale_b=w_scale,
            scale_recipe_b=F.ScalingType.BlockWise128x128,
            output_dtype=torch.bfloat16,
        ).to(out_dtype)

    def kernel(self, m: int, weight: Prepared, dtype: torch.dtype) -> str:
        return "scaled_mm block" if weight.scheme.activation == GROUP_128 else "scaled_mm"


def _block_scales(scale: torch.Tensor) -> torch.Tensor:
    """Scales [N/128, K/128] as cuBLASLt reads them: [K/128 rounded up to 4, N/128], each column contiguous."""
    return F.pad(scale, (0, -scale.shape[1] % 4)).t()


def _rejects_scheme(scheme: Scheme, machine: Machine) -> list[str]:
    pair = (scheme.weight, scheme.activation)
    if (scheme.weight == TENSOR or scheme.weight.by_row) and scheme.activation in (TENSOR, ROW):
        return []
    if pair != (BLOCK_128, GROUP_128):
        return [f"scales per tensor, per row, or 128x128 with 1x128 activations; found {scheme}"]
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
    if machine.device == "rocm" and "fnuz" in machine.features:
        reasons.append("gfx942 multiplies e4m3fnuz only, and weights are e4m3fn")
    if machine.device == "mps" and machine.torch_version < (2, 15):
        reasons.append(f"needs torch 2.15 on mps, found {'.'.join(map(str, machine.torch_version))}")
    return reasons


def _rejects_grouped(spec: MatmulSpec, machine: Machine) -> list[str]:
    """``scaled_grouped_mm`` of torch 2.11: row-wise CUTLASS kernels, bfloat16 out (torch's GroupedBlas.cpp)."""
    reasons = []
    if machine.device != "cuda" or (machine.capability or (0, 0)) < (9, 0):
        reasons.append(f"grouped products need compute capability 9.0 or newer, found {machine.device} {machine.name}")
    if not spec.scheme.weight.by_row or spec.scheme.activation != ROW:
        reasons.append(f"grouped products scale rows and tokens, found {spec.scheme}")
    return reasons


def _cuda(machine: Machine) -> str:
    capability = "unknown" if machine.capability is None else "{}.{}".format(*machine.capability)
    cuda = "none" if machine.cuda_version is None else "{}.{}".format(*machine.cuda_version)
    return f"(compute capability {capability}, CUDA {cuda})"
