"""A transformers mixture-of-experts block: bfloat16 with its fastest implementation compared with FP8.

    python benchmarks/moe.py [--tokens 1,16,128,512] [--engines auto,cpu] [--save NAME]

All implementations of both are timed in one run, paired; medians. The table compares the fastest of each. The blocks
are checked against each other before they are timed.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import transformers
from harness import paired_seconds, save, table
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, report

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,16,128,512")
    parser.add_argument("--engines", default="auto,cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row of the table")
    parser.add_argument("--save", help="write benchmarks/results/SAVE.json")
    arguments = parser.parse_args()
    rows = []
    for name, make in BLOCKS.items():
        dense = make()
        blocks = {engine: patched(dense, engine) for engine in arguments.engines.split(",")}
        for m in map(int, arguments.tokens.split(",")):
            row = {"block": name, "tokens": m, **measure(dense, blocks, m, arguments.seconds)}
            rows.append(row)
            print(table([row], list(row)), flush=True)
    print(table(rows, list(rows[0])))
    if arguments.save:
        print(save(arguments.save, rows))


def qwen3() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_experts=64, num_experts_per_tok=8
    )
    return filled(Qwen3MoeSparseMoeBlock(config), config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=1024, intermediate_size=3584, num_local_experts=8, num_experts_per_tok=2
    )
    return filled(MixtralSparseMoeBlock(config), config)


BLOCKS = {"Qwen3-MoE-like, 64 x 2048 x 768, top 8": qwen3, "Mixtral-like, 8 x 1024 x 3584, top 2": mixtral}


def filled(block: nn.Module, config: Any) -> nn.Module:
    """Random weights, and the configuration from which the experts take their implementation."""
    block.config = config
    block.experts.config = config
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return block.to(torch.bfloat16).eval()


def patched(dense: nn.Module, engine: str) -> nn.Module:
    options = FP8GemmOptions(engine=engine, fp16_weight_storage="discard")
    return enable_fp8_gemm(copy.deepcopy(dense), options=options)


def measure(dense: nn.Module, blocks: dict[str, nn.Module], m: int, seconds: float) -> dict[str, Any]:
    x = torch.randn(1, m, dense.config.hidden_size, dtype=torch.bfloat16)
    candidates = {}
    for name, block in {"dense": dense, **blocks}.items():
        for implementation in IMPLEMENTATIONS:
            if implementation == "batched_mm" and m > 16:
                continue  # it copies an expert for every token
            candidates[f"{name} {implementation}"] = lambda b=block, i=implementation: run(b, i, x)
    expected = run(dense, "eager", x).float()
    for name, call in candidates.items():
        error = ((call().float() - expected).norm() / expected.norm()).item()
        if error > 0.08:
            raise SystemExit(f"{name} is off by {error:.2f} at {m} tokens")
    medians = paired_seconds(candidates, seconds=seconds)
    result: dict[str, Any] = {}
    for name in ("dense", *blocks):
        best = min((key for key in medians if key.startswith(f"{name} ")), key=medians.__getitem__)
        result |= {f"{name} ms": medians[best] * 1e3, f"{name} best": best.removeprefix(f"{name} ")}
        if name != "dense":
            stacks = [row for row in report(blocks[name]).converted if "experts" in row.name]
            result |= {f"{name} x": result["dense ms"] / result[f"{name} ms"], f"{name} runs": stacks[0].engine}
    return result


@torch.inference_mode()
def run(block: nn.Module, implementation: str, x: torch.Tensor) -> torch.Tensor:
    block.config._experts_implementation = implementation
    block.experts.config._experts_implementation = implementation
    y = block(x)
    return y[0] if isinstance(y, tuple) else y


if __name__ == "__main__":
    main()
