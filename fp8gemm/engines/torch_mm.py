"""torch's own FP8 products, ``torch.nn.functional.scaled_mm`` and its predecessor ``torch._scaled_mm``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..numerics import expand_scale, quantize
from ..scaled import BLOCK_128, GROUP_128, ROW, TENSOR, ScaledTensor, Scheme
from .activations import TOKENS_TOGETHER, group_scales
from .base import Engine, Machine, MatmulSpec, PackedWeight
from .padding import cropped, padded, padded_scale, widened
from .scaled_mm import (
    ALIGNMENT,
    FNUZ,
    block_scales,
    from_fnuz,
    multiplies_rows,
    multiply,
    multiply_blocks,
    multiply_grouped,
    scaled_after,
    takes_fnuz,
    to_fnuz,
)

_ACCELERATORS = ("cuda", "rocm", "xpu", "mps")

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


@dataclass(frozen=True)
class TorchGpu:
    """Whether torch has a row-wise product on this accelerator; otherwise row scales follow a tensor-wise one."""

    rows: bool

    def __str__(self) -> str:
        return "row-wise products" if self.rows else "tensor-wise products only; row scales are applied after them"


class TorchEngine(Engine):
    """Tensor, row and 128x128-block scaling through torch; N and K are padded with zeros, to 16 or to whole blocks.

    Block scaling needs an H100 or H200 and CUDA 12.9. AMD's gfx942 multiplies e4m3fnuz, so operands are rounded to
    e4m3fn as everywhere and then converted, which gives the same products. On a CPU torch takes 24 ms to 9 s per call,
    so ``auto`` never chooses it there; requested by name it runs, for tests. Weight-only schemes are not supported.
    """

    name = "torch"
    tolerance = 8e-3  # the tensor cores' 14-bit accumulator, and rounding to bfloat16
    traceable = True

    def probe(self, device: torch.device, machine: Machine) -> TorchCpu | TorchGpu | None:
        if device.type != "cpu":
            return None if _rejects_machine(machine) else TorchGpu(multiplies_rows(device))
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
                row_scale = padded_scale(expand_scale(scale, scheme.weight, weight.shape), ALIGNMENT)
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
            extra={"w": data.t(), "w_scale": w_scale, **_unit_scale(scheme, data)},
        )

    def restore(self, packed: PackedWeight) -> ScaledTensor:
        """The plain weight, bit for bit; except, on gfx942, the signs of zeros and NaN, which e4m3fnuz does not
        have."""
        data = cropped(packed)
        if data.dtype == FNUZ:
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
        scale = padded_scale(expand_scale(weight.scale, scheme.weight, weight.shape), ALIGNMENT).squeeze(-1)
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
        xq = quantize(widened(x, weight), ROW)
        return multiply_grouped(xq.data, xq.scale, (w, w_scale), weight, ends, bias, out_dtype)

    def _row(self, x: torch.Tensor, weight: PackedWeight, out_dtype: torch.dtype) -> torch.Tensor:
        scheme = weight.scheme
        assert scheme.activation is not None
        xq = quantize(x, scheme.activation, scale=weight.input_scale if scheme.static else None)
        w, w_scale = weight.extra["w"], weight.extra["w_scale"]
        data, x_scale = widened(xq.data, weight), xq.scale
        if w.dtype == FNUZ:
            data, x_scale = to_fnuz(data), 2 * x_scale
        fast = on_accelerator(x) and weight.fast
        if w_scale.numel() == x_scale.numel() == 1:
            return multiply(data, w, x_scale, w_scale, None, out_dtype, fast)
        if "one" in weight.extra:
            return scaled_after(data, w, x_scale, w_scale, weight.extra["one"], fast).to(out_dtype)
        if x_scale.numel() == 1:
            x_scale = x_scale.expand(x.shape[0], 1).contiguous()
        elif w_scale.numel() == 1:
            w_scale = w_scale.expand(1, w.shape[1]).contiguous()
        if w.dtype == FNUZ or (on_accelerator(x) and torch.version.hip is not None):
            # with row scales hipBLASLt returns bfloat16 only (ScaledBlas.cpp)
            return multiply(data, w, x_scale, w_scale, None, torch.bfloat16, fast).to(out_dtype)
        if not on_accelerator(x):
            return torch._scaled_mm(data, w, scale_a=x_scale, scale_b=w_scale, out_dtype=out_dtype)
        return multiply(data, w, x_scale, w_scale, None, out_dtype, fast)

    def _block(self, x: torch.Tensor, weight: PackedWeight, out_dtype: torch.dtype) -> torch.Tensor:
        xq = quantize(widened(x, weight), GROUP_128)  # the caller removes rows past M
        data, x_scale = padded(xq.data, TOKENS_TOGETHER, 1), group_scales(xq.scale, TOKENS_TOGETHER)
        return multiply_blocks(data, weight.extra["w"], x_scale, weight.extra["w_scale"]).to(out_dtype)

    def kernel(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> str:
        if weight.scheme.activation == GROUP_128:
            return "scaled_mm block"
        return "scaled_mm, then scales" if "one" in weight.extra else "scaled_mm"


def on_accelerator(tensor: torch.Tensor) -> bool:
    return tensor.device.type not in ("cpu", "meta")


def _unit_scale(scheme: Scheme, data: torch.Tensor) -> dict[str, torch.Tensor]:
    """``one`` where row scales have to be applied after a product with scales of 1; decided here, outside of traces."""
    rows = scheme.weight.by_row or scheme.activation == ROW
    if not rows or not on_accelerator(data) or multiplies_rows(data.device):
        return {}
    return {"one": torch.ones((), dtype=torch.float32, device=data.device)}


def _rejects_scheme(scheme: Scheme, machine: Machine) -> list[str]:
    pair = (scheme.weight, scheme.activation)
    if (scheme.weight == TENSOR or scheme.weight.by_row) and scheme.activation in (TENSOR, ROW):
        if machine.system == "win32" and pair != (TENSOR, TENSOR) and machine.facts("torch", TorchGpu) is None:
            return ["torch has no row-wise product on Windows; whether tensor-wise ones serve it takes a probe"]
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
