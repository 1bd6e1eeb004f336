"""Writes a page about a sentence-embedding model with real weights in FP8, and shows how a layer that is not is found.

python examples/report.py [FILE]
"""

import sys

import torch
import torch.nn.functional as F
from quickstart import SENTENCES, bundled_model
from transformers import AutoModel, AutoTokenizer

from fp8gemm import enable_fp8_gemm, measure, report, strict

source, file = bundled_model(), sys.argv[1] if len(sys.argv) > 1 else "report.html"
tokens = dict(AutoTokenizer.from_pretrained(source)(SENTENCES[:4], padding=True, return_tensors="pt"))
model = AutoModel.from_pretrained(source, dtype=torch.bfloat16).eval()
errors = measure(model, tokens)

enable_fp8_gemm(model, module_filter="!pooler.*")
with torch.inference_mode(), strict(model):  # raises if a layer does not run on FP8
    model(**tokens)
found = report(model)
found.check()
found.to_html(file, errors=errors)
print(found.coverage)
print(f"{file}: {found.bytes_before / 1e6:.1f} MB of weights became {found.bytes_after / 1e6:.1f} MB")

layer = model.encoder.layer[0].intermediate.dense
layer.forward = lambda x: F.linear(x, layer.weight.dequantize(), layer.bias)  # someone takes the values instead
try:
    with torch.inference_mode(), strict(model):
        model(**tokens)
except ValueError as error:
    print(error)
