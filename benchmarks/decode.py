"""A Llama-like decoder of 1.1 billion random parameters: tokens per second and time to the first token, dense and FP8.

    python benchmarks/decode.py [--dtype bfloat16] [--engines cpu,cpu+joined] [--prompt 512] [--new 64] [--save NAME]

Batch size 1, greedy, with a key-value cache. The phases of all models are timed in turn, ``--repeats`` times; medians.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
import transformers
from harness import paired_seconds, save, table
from torch import nn

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, fuse_siblings, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engines", default="cpu,cpu+joined", help="+joined: with fuse_siblings")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", help="write benchmarks/results/SAVE.json")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    dense = llama(getattr(torch, arguments.dtype))
    models = {"dense": dense}
    for name in arguments.engines.split(","):
        engine, _, joined = name.partition("+")
        options = FP8GemmOptions(engine=engine, fp16_weight_storage="discard")
        models[name] = enable_fp8_gemm(copy.deepcopy(dense), options=options)
        if joined:
            fuse_siblings(models[name], share_in_inference_mode=True)
        gc.collect()
    prompt = torch.randint(0, 32000, (1, arguments.prompt))
    first = {name: (lambda m=model: step(m, prompt)) for name, model in models.items()}
    decode = {name: (lambda m=model: generate(m, prompt[:, :16], arguments.new)) for name, model in models.items()}
    to_first, to_all = timed(first, arguments.repeats), timed(decode, arguments.repeats)
    rows = [
        {
            "model": name,
            "tokens per second": arguments.new / to_all[name],
            "x": to_all["dense"] / to_all[name],
            f"ms to first of {arguments.prompt}": to_first[name] * 1e3,
            "first x": to_first["dense"] / to_first[name],
            "weights MB": sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) / 1e6,
            "runs": report(model).converted[0].engine if name != "dense" else "",
        }
        for name, model in models.items()
    ]
    print(table(rows, list(rows[0])))
    if arguments.save:
        print(save(arguments.save, rows, dtype=arguments.dtype, new_tokens=arguments.new))


def timed(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    return paired_seconds(calls, seconds=0.0, least=repeats, most=repeats)


def llama(dtype: torch.dtype) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.inference_mode()
def step(model: nn.Module, tokens: torch.Tensor) -> Any:
    return model(tokens, logits_to_keep=1)


@torch.inference_mode()
def generate(model: nn.Module, prompt: torch.Tensor, new: int) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    return found


if __name__ == "__main__":
    main()
