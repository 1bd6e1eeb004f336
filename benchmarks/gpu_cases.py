"""The products that benchmarks/gpu.py times, and their lower bounds by the memory and arithmetic of an H200."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from fp8gemm.engines.triton.plan import BF16_FLOPS, BYTES_PER_SECOND

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
KINDS = ("row", "block", "grouped")
# Layers as N x K; stacks of experts as E x N x K.
MODELS: dict[str, dict[str, tuple[int, ...]]] = {
    "llama-8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "lm_head": (128256, 4096),
    },
    "llama-70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
    "deepseek-v3": {
        "q_a+kv_a": (2112, 7168),
        "q_b": (24576, 1536),
        "kv_b": (32768, 512),
        "o": (7168, 16384),
        "dense gate_up": (36864, 7168),
        "dense down": (7168, 18432),
        "experts gate_up": (256, 4096, 7168),
        "experts down": (256, 7168, 2048),
    },
    "mixtral": {"experts gate_up": (8, 28672, 4096), "experts down": (8, 4096, 14336)},
    "flux": {
        "qkv": (9216, 3072),
        "proj": (3072, 3072),
        "mlp up": (12288, 3072),
        "mlp down": (3072, 12288),
        "proj_out": (3072, 15360),
    },
    "wan-14b": {"qkv": (5120, 5120), "ffn up": (13824, 5120), "ffn down": (5120, 13824)},
}
# For an H200, bfloat16 as measured, and FP8 products at the same fraction of the nominal rate.
FP8_FLOPS = 2 * BF16_FLOPS


@dataclass(frozen=True, kw_only=True)
class Case:
    """One product: ``experts`` is 0 for a single weight."""

    kind: str
    model: str
    layer: str
    n: int
    k: int
    m: int
    experts: int = 0

    @property
    def fp8_bytes(self) -> int:
        """The minimum that an FP8 product reads and writes: e4m3 operands, float32 scales, bfloat16 results."""
        m, n, k = self.m, self.n, self.k
        return m * k + self._weights + 2 * m * n + 4 * (m + n)

    @property
    def floors(self) -> dict[str, float]:
        """Lower bounds in microseconds by the memory and arithmetic of an H200, in bfloat16 and in FP8."""
        m, n, k = self.m, self.n, self.k
        bf16 = max(2 * m * n * k / BF16_FLOPS, 2 * (m * k + self._weights + m * n) / BYTES_PER_SECOND)
        fp8 = max(2 * m * n * k / FP8_FLOPS, self.fp8_bytes / BYTES_PER_SECOND)
        return {"bf16 floor us": bf16 * 1e6, "fp8 floor us": fp8 * 1e6}

    @property
    def _weights(self) -> int:
        """The number of elements in the weights that tokens can reach."""
        return self.n * self.k * max(1, min(self.experts, self.m))


def cases(kinds: list[str], models: list[str], tokens: list[int]) -> Iterator[Case]:
    """Every layer once per supported kind and M; shapes that two models share only once."""
    seen = set()
    for kind, model in itertools.product(kinds, models):
        for layer, shape in MODELS[model].items():
            if (len(shape) == 3) != (kind == "grouped") or (kind, shape) in seen:
                continue
            seen.add((kind, shape))
            *experts, n, k = shape
            for m in tokens:
                yield Case(kind=kind, model=model, layer=layer, n=n, k=k, m=m, experts=experts[0] if experts else 0)
