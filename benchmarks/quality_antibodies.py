"""AntiBERTy, a BERT for antibodies: which residue is missing?

antibodies.txt has the variable domains of three antibodies that are used as drugs, as their published sequences. Every
eighth residue is hidden, eight times over, so that each is once.
"""

from __future__ import annotations

from pathlib import Path

import torch
from quality_cases import Case, Output, Task, folder
from quality_metrics import predictions
from torch import nn

SEQUENCES = Path(__file__).parent / "antibodies.txt"
STRIDE = 8


def sequences(path: Path = SEQUENCES) -> list[str]:
    return [line.split()[-1] for line in path.read_text().splitlines()]


def masked(chains: list[str], vocabulary: list[str], stride: int = STRIDE) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[chains * stride, length]`` with hidden residues, and labels: the residue, -1 where it is not hidden.

    A row begins with [CLS], ends with [SEP], and is filled up with [PAD].
    """
    ids = {token: index for index, token in enumerate(vocabulary)}
    length = max(map(len, chains)) + 2
    tokens = torch.full((len(chains), length), ids["[PAD]"])
    labels = torch.full((stride, len(chains), length), -1)
    hidden = tokens.repeat(stride, 1, 1)
    for row, chain in enumerate(chains):
        residues = torch.tensor([ids[residue] for residue in chain])
        whole = torch.cat([torch.tensor([ids["[CLS]"]]), residues, torch.tensor([ids["[SEP]"]])])
        hidden[:, row, : len(whole)] = whole
        for offset in range(stride):
            places = torch.arange(offset, len(chain), stride) + 1
            labels[offset, row, places] = whole[places]
            hidden[offset, row, places] = ids["[MASK]"]
    return hidden.flatten(0, 1), labels.flatten(0, 1)


def load() -> Task:
    from transformers import BertConfig, BertForMaskedLM

    models = folder("antiberty") / "trained_models"
    checkpoint = models / "AntiBERTy_md_smooth"
    model = BertForMaskedLM(BertConfig.from_pretrained(str(checkpoint))).eval()
    state = torch.load(checkpoint / "pytorch_model.bin", weights_only=True, map_location="cpu")
    absent = model.load_state_dict(state, strict=False).missing_keys  # beside its heads for species and chains
    if absent:
        raise ValueError(f"the checkpoint of AntiBERTy has no {', '.join(absent)}")
    vocabulary = (models / "vocab.txt").read_text().split()
    tokens, labels = masked(sequences(), vocabulary)
    mask = (tokens != vocabulary.index("[PAD]")).long()
    asked = labels >= 0

    def run(model: nn.Module) -> Output:
        return Output(values=model(input_ids=tokens, attention_mask=mask).logits[asked])

    return Task(
        model=model, run=run, measures=lambda found, dense: predictions(found.values, dense.values, labels[asked])
    )


CASE = Case(
    name="AntiBERTy",
    kind="protein language model",
    packages={"antiberty": "antiberty==0.1.3", "transformers": "transformers"},
    license="MIT",
    score="right %",
    agreement="same as dense %",
    load=load,
)
