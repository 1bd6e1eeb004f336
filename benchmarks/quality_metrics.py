"""Measures of quality: correlations of rankings, language models' predictions, and the distance to another output."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 1 in float64; equal values get the mean of theirs."""
    _, group, sizes = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    return (last - (sizes.double() - 1) / 2)[group]


def spearman(left: torch.Tensor, right: torch.Tensor) -> float:
    """The rank correlation of two vectors, with mean ranks for ties; NaN if one of them is constant."""
    x, y = (ranks(values) - (len(values) + 1) / 2 for values in (left, right))
    return (x @ y / (x @ x).sqrt() / (y @ y).sqrt()).item()


def kendall(left: torch.Tensor, right: torch.Tensor) -> float:
    """Kendall's tau-b of two vectors: the share of pairs in the same order less that in the opposite one.

    Pairs that are tied in either count in neither and shrink the denominator.
    """
    rows, columns = torch.triu_indices(len(left), len(left), 1)
    x, y = ((values[rows] - values[columns]).sign().double() for values in (left, right))
    return (x @ y / (x @ x).sqrt() / (y @ y).sqrt()).item()


def neighbors_kept(found: torch.Tensor, dense: torch.Tensor, k: int) -> float:
    """The share of each item's ``k`` nearest others by ``dense`` ``[items, width]`` that are so by ``found``, too."""

    def nearest(embeddings: torch.Tensor) -> list[set[int]]:
        unit = F.normalize(embeddings.double(), dim=-1)
        similarity = (unit @ unit.T).fill_diagonal_(-math.inf)
        return [set(row.tolist()) for row in similarity.topk(k).indices]

    pairs = zip(nearest(found), nearest(dense), strict=True)
    return sum(len(one & other) for one, other in pairs) / (k * len(dense))


def predictions(logits: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """What logits ``[items, classes]`` say of labels ``[items]``, beside those of the dense model."""
    found, expected = (values.double().log_softmax(-1) for values in (logits, dense))
    same = logits.argmax(-1) == dense.argmax(-1)
    return {
        "right %": 100 * (logits.argmax(-1) == labels).double().mean().item(),
        "perplexity": F.nll_loss(found, labels).exp().item(),
        "same as dense %": 100 * same.double().mean().item(),
        "KL bits": F.kl_div(found, expected, reduction="batchmean", log_target=True).item() / math.log(2),
    }


def relative_error(found: torch.Tensor, dense: torch.Tensor) -> float:
    """The norm of the difference over the norm of ``dense``."""
    difference = found.double() - dense.double()
    return (difference.norm() / dense.double().norm()).item()


def worst_item(found: torch.Tensor, dense: torch.Tensor) -> float:
    """The largest relative error of one item (an entry of the first dimension)."""
    difference = (found.double() - dense.double()).flatten(1).norm(dim=1)
    return (difference / dense.double().flatten(1).norm(dim=1)).max().item()


def note_f1(found: list[tuple[int, float]], played: list[tuple[int, float]], tolerance: float) -> float:
    """The F1 score of notes (pitch, onset in seconds); a note is found if its onset is right within ``tolerance``.

    Each played note is matched by one found note at most, the nearest of its pitch that is left.
    """
    left = list(found)
    hits = 0
    for pitch, onset in played:
        near = [note for note in left if note[0] == pitch and abs(note[1] - onset) <= tolerance]
        if near:
            left.remove(min(near, key=lambda note: abs(note[1] - onset)))
            hits += 1
    total = len(found) + len(played)
    return 2 * hits / total if total else 1.0
