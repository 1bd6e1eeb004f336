"""sentence-transformers: models saved and loaded again by its own loader."""

from __future__ import annotations

import tempfile
from typing import Any

import sentence_transformers
import torch
import transformers
from compatibility import Trial
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from tiny import DISCARD, bert, dequantized, error, is_fp8, patched, tokenizer

from fp8gemm import enable_fp8_gemm

TEXTS = ["a big cabin", "dad"]


def encoder(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        transformers.BertModel(bert()).to(dtype).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        parts = [Transformer(folder), Pooling(64), Dense(64, 32).to(dtype)]
        return sentence_transformers.SentenceTransformer(modules=parts, device="cpu")


def embeds() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = patched(encoder(dtype), DISCARD)
        twin = dequantized(model)
        expected = twin.encode(TEXTS, convert_to_tensor=True)
        with tempfile.TemporaryDirectory() as folder:
            model.save(folder)
            again = sentence_transformers.SentenceTransformer(folder, device="cpu")
        assert again.encode(TEXTS, convert_to_tensor=True).equal(expected)
        enable_fp8_gemm(again)
        assert is_fp8(again, 14)
        assert error(again.encode(TEXTS, convert_to_tensor=True), expected) < 0.05


def ranks() -> None:
    pairs = [("a big cabin", "dad"), ("a", "b")]
    with tempfile.TemporaryDirectory() as folder:
        transformers.BertForSequenceClassification(bert(num_labels=1)).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        model = enable_fp8_gemm(sentence_transformers.CrossEncoder(folder, device="cpu"))
    expected = dequantized(model).predict(pairs)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = sentence_transformers.CrossEncoder(folder, device="cpu")
    assert (again.predict(pairs) == expected).all()


TRIALS = [
    Trial(
        library="sentence-transformers",
        what="`SentenceTransformer` with a dense layer: `save` and its own loader",
        run=embeds,
        note="dense, with the values that FP8 holds",
    ),
    Trial(library="sentence-transformers", what="`CrossEncoder`: `save_pretrained` and its own loader", run=ranks),
]
