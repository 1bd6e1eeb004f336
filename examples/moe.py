"""Patches a tiny transformers mixture-of-experts model; shows what happens to its experts and its logits.

python examples/moe.py [--implementation eager|batched_mm|grouped_mm]
"""

from __future__ import annotations

import argparse
import copy

import torch
import transformers

from fp8gemm import FP8GemmOptions, FP8Weight, enable_fp8_gemm, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", default="grouped_mm", choices=["eager", "batched_mm", "grouped_mm"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=384,
        num_experts=16,
        num_experts_per_tok=4,
    )
    dense = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    dense.set_experts_implementation(arguments.implementation)
    model = enable_fp8_gemm(copy.deepcopy(dense), options=FP8GemmOptions(fp16_weight_storage="discard"))
    tokens = torch.randint(0, 1000, (1, 32))
    with torch.inference_mode():
        expected, found = dense(tokens).logits.float(), model(tokens).logits.float()

    print(report(model))
    experts = [p for p in model.parameters() if isinstance(p, FP8Weight) and p.dim() == 3]
    stacks = [row for row in report(model).converted if row.name.endswith(("gate_up_proj", "down_proj"))]
    before, after = sum(row.bytes_before for row in stacks), sum(row.bytes_after for row in stacks)
    print(f"\n{len(experts)} stacks of experts, {before / 1e6:.1f} -> {after / 1e6:.1f} MB, in {type(model).__name__}")
    print(f"dequantized {sum(row.dequantizations for row in stacks)} times; routers stay in bfloat16")
    print(f"relative error of the logits (in norm): {((found - expected).norm() / expected.norm()).item():.3f}")


if __name__ == "__main__":
    main()
