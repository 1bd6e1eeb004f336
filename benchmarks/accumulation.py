"""What FP8 products lose in the tensor cores' accumulator, beside what rounding to FP8 costs: emulated, without a card.

    pip install --no-deps mmaemu
    python benchmarks/accumulation.py [--save accumulation_emulated]

mmaemu computes the sums bit for bit as cuBLASLt does on an H100 and on an RTX 4060, here never split along K. Operands
are quantized by row; errors are relative to the float64 product of the quantized operands, FP8's own to the product of
the unquantized ones.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from typing import Any

import torch
import torch.nn.functional as F
from harness import save

from fp8gemm import ROW, quantize

CARDS = {"H100": "hopper-ws0", "RTX 4060": "ada-ws0"}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
OPERANDS = ("language model", "one sign")
COLUMNS = ("K", "FP8", "bfloat16", *(f"{how}, {card}" for how in ("fast", "precise") for card in CARDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", help="write benchmarks/results/SAVE.json")
    arguments = parser.parse_args()
    rows = [row for kind in OPERANDS for k in LENGTHS for row in measure(kind, k)]
    for kind in OPERANDS:
        print(f"{kind}\n{markdown(rows, kind)}\n")
    if arguments.save:
        print(save(arguments.save, rows, mmaemu=importlib.metadata.version("mmaemu")))


def operands(kind: str, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``[M, k]`` and a weight ``[N, k]``.

    Those of a language model: half of the tokens have heavy tails (Student's t with five degrees of freedom) and one
    outlier feature in 256, 20 times as large as the others; half come from a gated activation, as the input of a down
    projection does. Normal weights. Or absolute values of normal ones, so that all products have one sign.
    """
    torch.manual_seed(k)
    if kind == "one sign":
        return torch.randn(8, k).abs(), torch.randn(16, k).abs()
    heavy = torch.randn(16, k) / (torch.randn(5, 16, k).square().mean(0)).sqrt()
    heavy[:, torch.randperm(k)[: k // 256]] *= 20
    gated = F.silu(torch.randn(16, k)) * torch.randn(16, k)
    return torch.cat([heavy, gated]), torch.randn(32, k)


def measure(kind: str, k: int) -> list[dict[str, Any]]:
    """The errors of sums of ``k`` products on each card: relative Frobenius norms, and the worst token and output.

    ``share`` is the error of fast sums as a part of that of quantization.
    """
    import mmaemu

    x, w = operands(kind, k)
    xq, wq = quantize(x, ROW), quantize(w, ROW)
    scale = xq.scale.double() * wq.scale.double().t()
    dense = x.double() @ w.double().t()
    expected = (xq.data.double() @ wq.data.double().t()) * scale
    rows = []
    for card, profile in CARDS.items():
        error = {
            how: mmaemu.accumulate(xq.data, wq.data, use_fast_accum=how == "fast", profile=profile) * scale - expected
            for how in ("fast", "precise")
        }
        norm = error["fast"].norm()
        rows.append(
            {
                "operands": kind,
                "K": k,
                "card": card,
                "FP8": ((expected - dense).norm() / dense.norm()).item(),
                "bfloat16": ((expected.bfloat16() - expected).norm() / expected.norm()).item(),
                **{how: (error[how].norm() / expected.norm()).item() for how in error},
                "fast, worst token": (error["fast"].norm(dim=1) / expected.norm(dim=1)).max().item(),
                "fast, worst output": (error["fast"].norm(dim=0) / expected.norm(dim=0)).max().item(),
                "share": (norm / (expected - dense).norm()).item(),
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]], kind: str) -> str:
    """A table of the errors of one kind of operands in percent, one line for each K."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for k in dict.fromkeys(row["K"] for row in rows):
        found = {row["card"]: row for row in rows if (row["operands"], row["K"]) == (kind, k)}
        first = found["H100"]
        errors = [first["FP8"], first["bfloat16"], *(found[card][how] for how in ("fast", "precise") for card in CARDS)]
        lines.append(f"| {k} | " + " | ".join(f"{100 * error:.2f}" for error in errors) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
