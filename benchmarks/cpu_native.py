"""The compiled CPU kernels compared with ``F.linear`` and vLLM's op on cold weights, paired; and the quantizer.

    python benchmarks/cpu_native.py [--shapes 4096x4096,...] [--tokens 1,2,...] [--dtype bfloat16] [--granularity row]
        [--instructions amx,avx512_bf16,avx2] [--megabytes 200]

Each round runs a stack of layers with every candidate, so that weights come from memory as in a real model.
``--megabytes 0`` has a single layer, which stays in the caches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import host, paired_seconds, table

from fp8gemm import BLOCK_128, GROUP_128, MX, ROW, TENSOR, ScaledTensor, native, probe, quantize
from fp8gemm.engines.vllm import Vllm

GRANULARITIES = {"row": ROW, "tensor": TENSOR, "block": BLOCK_128, "group": GROUP_128, "mx": MX}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x14336", help="N x K")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,512,1024")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--granularity", default="row", choices=GRANULARITIES)
    parser.add_argument("--instructions", default="amx", help="levels, each at most what this CPU has")
    parser.add_argument("--megabytes", type=int, default=200, help="of dense weights to rotate through")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    arguments = parser.parse_args()
    library = native.find()
    if isinstance(library, native.Unavailable):
        raise SystemExit(library.reason)
    print(host())
    for shape in arguments.shapes.split(","):
        n, k = map(int, shape.split("x"))
        stack = Stack(n, k, arguments, library)
        what = {"n x k": shape, "scales": arguments.granularity, "dtype": arguments.dtype}
        tokens = map(int, arguments.tokens.split(","))
        rows = [{**what, "m": m, **row(stack.candidates(m), arguments.seconds)} for m in tokens]
        quantizing = {**what, **row(stack.quantizers(), arguments.seconds)}
        print(table(rows, list(rows[0])), "quantize:", table([quantizing], list(quantizing)), sep="\n", flush=True)


class Stack:
    """Layers in the dense dtype, and the same layers in FP8 for each candidate."""

    def __init__(self, n: int, k: int, arguments: argparse.Namespace, library: native.Library) -> None:
        self.dtype = getattr(torch, arguments.dtype)
        self.granularity = GRANULARITIES[arguments.granularity]
        self.libraries = {name: library.lowered(name) for name in arguments.instructions.split(",")}
        count = max(1, -(-arguments.megabytes * 10**6 // (n * k * 2)))
        self.dense = [torch.randn(n, k, dtype=self.dtype) for _ in range(count)]
        self.weights = [self._quantized(w) for w in self.dense]
        self.packed = [torch.ops._C.convert_weight_packed(w.data) for w in self.weights] if self._has_vllm(n, k) else []

    def _quantized(self, w: torch.Tensor) -> ScaledTensor:
        data = torch.empty(w.shape, dtype=torch.float8_e4m3fn)
        scale = torch.empty(self.granularity.scale_shape(w.shape))
        next(iter(self.libraries.values())).quantize(w, *self.granularity.block(w.shape), data, scale)
        return ScaledTensor(data, scale, self.granularity)

    def _has_vllm(self, n: int, k: int) -> bool:
        found = probe("cpu").facts("vllm", Vllm)
        fits = self.dtype == torch.bfloat16 and n % 32 == 0 and k % 32 == 0
        return fits and found is not None and "fp8_scaled_mm_cpu" in found.ops

    def candidates(self, m: int) -> dict[str, Callable[[], object]]:
        """Functions that run the whole stack once. vLLM's op gets 128 x 128 scales, the only ones it supports."""
        x = torch.randn(m, self.dense[0].shape[1]).to(self.dtype)
        n, k = self.dense[0].shape
        result: dict[str, Callable[[], object]] = {"torch": lambda: [F.linear(x, w) for w in self.dense]}
        if self.packed:
            scale = torch.ones(-(-n // 128), -(-k // 128))
            result["vllm"] = lambda: [
                torch.ops._C.fp8_scaled_mm_cpu(x, w, scale, [128, 128], None, self.dtype, True) for w in self.packed
            ]
        for name, library in self.libraries.items():
            result[name] = lambda library=library: [self._linear(library, x, w) for w in self.weights]
        return result

    def _linear(self, library: native.Library, x: torch.Tensor, w: ScaledTensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], w.shape[0])
        library.linear(x, w.data, w.scale, *self.granularity.block(w.shape), None, out)
        return out

    def quantizers(self) -> dict[str, Callable[[], object]]:
        w = self.dense[0]
        return {"torch": lambda: quantize(w, self.granularity), "native": lambda: self._quantized(w)}


def row(candidates: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Each candidate's median milliseconds per round, and its speedup over torch."""
    medians = paired_seconds(candidates, seconds=seconds, most=10**6)
    cells = {"torch ms": medians["torch"] * 1e3}
    for name in candidates:
        if name != "torch":
            cells |= {f"{name} ms": medians[name] * 1e3, f"{name} x": medians["torch"] / medians[name]}
    return cells


if __name__ == "__main__":
    main()
