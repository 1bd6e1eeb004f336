"""What the Triton engine's plans cost beside reading the weight."""

from __future__ import annotations

import pytest

from fp8gemm.engines.triton.plan import Kind, Plan, formula, place

# (N, K) of linear layers.
LAYERS = {
    "llama 8B": [(6144, 4096), (4096, 4096), (1024, 4096), (28672, 4096), (14336, 4096), (4096, 14336)],
    "llama 70B": [(10240, 8192), (8192, 8192), (1024, 8192), (57344, 8192), (8192, 28672)],
    "qwen 7B": [(4608, 3584), (3584, 3584), (512, 3584), (37888, 3584), (3584, 18944)],
    "qwen 32B": [(7168, 5120), (5120, 5120), (1024, 5120), (51200, 5120), (5120, 25600)],
    "deepseek": [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048), (256, 7168)],
}
H100 = place((9, 0), multiprocessors=132)


def _workspace(plan: Plan, n: int, m: int) -> int:
    """Bytes of partial sums written and read again."""
    return 2 * plan.splits * m * n * 4 if plan.splits > 1 else 0


@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize("kind", ["row", "block", "weight", "weight_k"])
def test_workspaces_are_small_beside_the_weight(kind: Kind, model: str) -> None:
    """At most 15 % of its bytes."""
    split = 0
    for n, k in LAYERS[model]:
        for m in (16, 32, 64):
            plan = formula(H100, kind, n, k, m, scale_cols=128 if kind == "weight_k" else 0)
            assert plan.path in ("tokens", "blocks")
            assert _workspace(plan, n, m) <= 0.15 * n * k, (n, k, m, plan)
            split += plan.splits > 1
    assert split, "no layer is split: nothing was tested"


@pytest.mark.parametrize("kind", ["row", "block"])
@pytest.mark.parametrize("model", LAYERS)
def test_16_tokens_occupy_the_card(kind: Kind, model: str) -> None:
    """Programs for about half of the multiprocessors or more, where N is not so small that a launch takes longer."""
    for n, k in LAYERS[model]:
        if n * k >= 2**22:
            plan = formula(H100, kind, n, k, 16)
            assert -(-n // plan.block_n) * plan.splits >= H100.multiprocessors * 0.45, (n, k, plan)
