"""benchmarks/quality_models.py: its metrics on values worked out by hand, its rows and tables on tiny stand-ins."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scripts
import torch
from torch import nn

from fp8gemm import FP8Weight

metrics = scripts.load("quality_metrics")
cases = scripts.load("quality_cases")
methods = scripts.load("quality_methods")
models = scripts.load("quality_models")
page = scripts.load("quality_page")
text = scripts.load("quality_text")
antibodies = scripts.load("quality_antibodies")
structure = scripts.load("quality_structure")
forecast = scripts.load("quality_forecast")
piano = scripts.load("quality_piano")


class TestMetrics:
    def test_ties_get_the_mean_of_their_ranks(self) -> None:
        assert metrics.ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]

    def test_spearman(self) -> None:
        x = torch.tensor([1.0, 2.0, 3.0, 4.0])
        assert metrics.spearman(x, x.exp()) == pytest.approx(1)
        assert metrics.spearman(x, -x) == pytest.approx(-1)
        # Ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15).
        assert metrics.spearman(x, torch.tensor([0.0, 5.0, 1.0, 9.0])) == pytest.approx(0.8)
        # Ranks 1 2 3 4 and 1.5 1.5 3 4: covariance 4.5, squares 5 and 4.5.
        assert metrics.spearman(x, torch.tensor([0.0, 0.0, 1.0, 2.0])) == pytest.approx(4.5 / math.sqrt(5 * 4.5))
        assert math.isnan(metrics.spearman(x, torch.ones(4)))

    def test_kendall(self) -> None:
        x = torch.tensor([1.0, 2.0, 3.0, 4.0])
        assert metrics.kendall(x, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(4 / 6)
        # One of six pairs is tied in the second vector only.
        assert metrics.kendall(x, torch.tensor([0.0, 0.0, 1.0, 2.0])) == pytest.approx(5 / math.sqrt(6 * 5))

    def test_neighbors_are_others_by_direction(self) -> None:
        dense = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 1.0], [0.1, 1.0]])
        assert metrics.neighbors_kept(3 * dense, dense, 1) == 1
        swapped = dense[[0, 2, 1, 3]]  # 0 is now next to 2, and 1 to 3
        assert metrics.neighbors_kept(swapped, dense, 1) == 0

    def test_predictions(self) -> None:
        dense = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log()
        found = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log() + torch.tensor([[0.1, 0.0], [0.0, 0.0]])
        labels = torch.tensor([0, 1])
        same = metrics.predictions(dense, dense, labels)
        assert same == pytest.approx({"right %": 100, "perplexity": 4 / 3, "same as dense %": 100, "KL bits": 0})
        assert metrics.predictions(found, dense, labels)["right %"] == 50
        assert metrics.predictions(found, dense, labels)["same as dense %"] == 50
        uniform = metrics.predictions(torch.zeros(2, 2), dense, labels)
        entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
        assert uniform["KL bits"] == pytest.approx(1 - entropy)
        assert uniform["perplexity"] == pytest.approx(2)

    def test_distances(self) -> None:
        dense = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        found = torch.tensor([[3.0, 0.0], [1.0, 4.0]])
        assert metrics.relative_error(found, dense) == pytest.approx(1 / 5)
        assert metrics.worst_item(found, dense) == pytest.approx(1 / 4)

    def test_a_note_is_found_once(self) -> None:
        played = [(60, 1.0), (60, 1.04), (62, 2.0)]
        assert metrics.note_f1(played, played, 0.05) == 1
        assert metrics.note_f1([(60, 1.02)], played, 0.05) == pytest.approx(2 / 4)
        assert metrics.note_f1([(61, 1.0), (62, 2.1)], played, 0.05) == 0
        assert metrics.note_f1([], [], 0.05) == 1


class TestInputs:
    def test_sentences_are_graded_and_written_once(self, tmp_path: Path) -> None:
        groups = text.groups()
        assert len(groups) >= 16
        sentences = [sentence for group in groups for sentence in group]
        assert len(set(sentences)) == len(sentences)
        (tmp_path / "short.txt").write_text("One.\nTwo.\n")
        with pytest.raises(ValueError, match=r"short.txt: a group has 6 sentences, not so: \['One.'\]"):
            text.groups(tmp_path / "short.txt")

    def test_embeddings_in_the_order_of_the_grades(self) -> None:
        angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5]).repeat(2)
        output = cases.Output(values=torch.stack([angles.cos(), angles.sin()], 1))
        measures = text.measures(output, output)
        assert measures["Spearman"] == pytest.approx(1)
        assert measures["Kendall tau to dense"] == pytest.approx(1)
        assert measures["5 nearest kept %"] == 100
        assert measures["largest change of a cosine"] == 0

    def test_each_residue_is_hidden_once(self) -> None:
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]
        chains = antibodies.sequences()
        assert len(chains) == 6
        tokens, labels = antibodies.masked(["ACD", "WY"], vocabulary, stride=2)
        a, c, d, w, y = (vocabulary.index(letter) for letter in "ACDWY")
        assert tokens.tolist() == [[2, 4, c, 4, 3], [2, 4, y, 3, 0], [2, a, 4, d, 3], [2, w, 4, 3, 0]]
        assert labels.tolist() == [[-1, a, -1, d, -1], [-1, w, -1, -1, -1], [-1, -1, c, -1, -1], [-1, -1, y, -1, -1]]
        _, labels = antibodies.masked(chains, vocabulary)
        assert int((labels >= 0).sum()) == sum(map(len, chains))

    def test_the_backbone_of_a_chain(self) -> None:
        def line(atom: str, name: str, chain: str, number: int, x: float) -> str:
            return f"ATOM  {1:5d}  {atom:<3} {name} {chain}{number:4d}    {x:8.3f}{0:8.3f}{-1:8.3f}  1.00  0.00"

        whole = [line(atom, "GLY", "A", 7, index) for index, atom in enumerate(("N", "CA", "C", "O", "CB"))]
        other = [line("CA", "GLY", "A", 7, 9.0), line("N", "ALA", "A", 8, 1.0), line("N", "TRP", "B", 9, 1.0)]
        again = ["ENDMDL", *[line(atom, "ALA", "A", 9, 0.0) for atom in structure.BACKBONE]]
        places, letters, numbers = structure.backbone([*whole, *other, *again], "A")
        assert places[0].tolist() == [[index, 0, -1] for index in range(4)]
        assert letters.tolist() == ["ACDEFGHIKLMNPQRSTVWY".index("G")]
        assert numbers.tolist() == [7]

    def test_windows_of_a_series(self, tmp_path: Path) -> None:
        (tmp_path / "wide.csv").write_text("YEAR,JAN,FEB\n1950,1,2\n1951,,4\n")
        series = forecast.read(tmp_path / "wide.csv")
        assert series[[0, 1, 3]].tolist() == [1, 2, 4]
        assert series[2].isnan()
        (context, future), (_, before) = forecast.windows(torch.arange(6.0), 2, 2)
        assert context.tolist() == [0, 1, 2, 3]
        assert future.tolist() == [4, 5]
        assert before.tolist() == [2, 3]
        row, mask, low, span = forecast.scaled(series, 6)
        assert row.tolist() == pytest.approx([0, 0, 0, 1 / 3, 0, 1])
        assert mask.tolist() == [False, False, True, True, False, True]
        assert (low, span) == (1, 3)
        assert forecast.scaled_error(torch.tensor([5.0, 5.0]), torch.tensor([0.0, 2.0, 4.0]), future) == 0.25

    def test_no_key_is_struck_while_it_is_down(self) -> None:
        notes = piano.music(seconds=6)
        assert notes == piano.music(seconds=6)
        for pitch in {note[0] for note in notes}:
            times = sorted(note[1:3] for note in notes if note[0] == pitch)
            assert all(end < onset for (_, end), (onset, _) in itertools.pairwise(times))
        assert max(end for _, _, end, _ in notes) < 6

    def test_stand_ins_are_gone_afterwards(self) -> None:
        before = sys.modules["json"]
        with piano.stand_ins(("json", "no_such_module")):
            assert sys.modules["json"] is not before
            assert "no_such_module" in sys.modules
        assert sys.modules["json"] is before
        assert "no_such_module" not in sys.modules


class Asks(nn.Module):
    """A model that reads the dtype of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x.to(self.first.weight.dtype)).relu())
        return y


def case(run: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda model, x: model(x), **changes: Any) -> Any:
    def load() -> Any:
        torch.manual_seed(0)
        model, x = Asks().eval(), torch.randn(4, 16)
        return cases.Task(
            model=model,
            run=lambda model: cases.Output(values=run(model, x).float()),
            measures=lambda found, dense: {"mean": found.values.mean().item(), "same": 1.0, "other": 2.0},
        )

    about = {"name": "tiny", "kind": "none", "packages": {"torch": "torch"}, "license": "none"}
    return cases.Case(**{**about, "score": "mean", "agreement": "same", "load": load, **changes})


def measured(*arguments: Any) -> list[dict[str, Any]]:
    return list(models.measure(*arguments))


def some(*engines: str) -> list[Any]:
    among = methods.methods(("row", "weight_only"), engines)
    return [method for method in among if method.library in ("unpatched", "fp8gemm")]


class TestRows:
    def test_each_method_is_measured_beside_the_unpatched_model(self) -> None:
        rows = measured(case(), ["bfloat16", "float32"], some("cpu", "reference"))
        assert [row["dtype"] for row in rows] == ["float32"] + 5 * ["bfloat16"] + 4 * ["float32"]
        assert not [row["reason"] for row in rows if "reason" in row]
        dense, rounded, *rest = rows
        assert dense["library"] == rounded["library"] == "unpatched"
        assert dense["error"] == dense["worst"] == 0
        assert 0 < rounded["error"] < min(row["error"] for row in rest)
        assert {row["weights"] for row in rest} == {2}
        assert {row["share on FP8"] for row in rest} == {1.0}
        assert dense["measures"] == {"mean": dense["score"], "same": dense["agreement"], "other": 2.0}

    def test_a_missing_package_is_a_row(self) -> None:
        absent = case(packages={"torch": "torch", "no_such_module": "no-such-package==1"})
        assert measured(absent, ["bfloat16"], []) == [
            {"model": "tiny", "reason": "not installed: pip install no-such-package==1"}
        ]

    def test_refusals_and_failures_are_rows(self) -> None:
        triton, *_ = (row for row in measured(case(), ["bfloat16"], some("triton")) if row["engine"])
        assert triton["reason"].startswith("runs on cuda only")
        assert "error" not in triton

        def fails(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
            if isinstance(model.get_submodule("first").weight, FP8Weight):
                raise TypeError("no such\nweight")
            return torch.ones(4, 1)

        rows = measured(case(run=fails), ["bfloat16"], some("cpu"))
        assert [row.get("reason") for row in rows] == [None, None, *2 * ["TypeError: no such weight"]]

    def test_only_linears_change_their_dtype(self) -> None:
        model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4)))
        cast = methods.computing_in(model, torch.bfloat16)
        assert model[1].weight.dtype == cast[0].weight.dtype == torch.float32
        assert cast[1].weight.dtype == cast[2][0].layer.weight.dtype == torch.bfloat16
        assert cast(torch.randn(2, 8)).dtype == torch.float32
        tied = nn.Sequential(*2 * [nn.Linear(8, 8)])
        assert len(set(methods.computing_in(tied, torch.bfloat16))) == 1

    def test_all_libraries_convert_linears_only(self) -> None:
        model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Flatten(), nn.Linear(8, 8))
        linears, everything = (method for method in methods.methods(("row",), ("cpu",)) if "fp8gemm" in method.library)
        assert methods.counted(methods.converted(linears, model)) == (1, None)
        model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Flatten(), nn.Linear(8, 8))
        assert methods.counted(methods.converted(everything, model)) == (2, None)

    def test_layers_that_fp8_does_not_suit_have_rows_without_them(self) -> None:
        rows = measured(case(dense=("second*",), why="it is said"), ["bfloat16"], some("cpu"))
        assert [(row["library"], row["weights"]) for row in rows[2:]] == [
            *2 * [("fp8gemm", 2)],
            *3 * [("fp8gemm with exceptions", 1)],
        ]
        assert rows[4]["error"] < rows[2]["error"]
        assert {row["engine"] for row in rows[2:]} == {"cpu"}

    def test_saved_rows_stay_where_they_are_not_measured_again(self, tmp_path: Path) -> None:
        saved = [row("one", "fp8gemm", "cpu", 1.0), row("two", "fp8gemm", "cpu", 1.0), row("one", "unpatched", "", 0.0)]
        saved[2]["scheme"] = ""
        (tmp_path / "old.json").write_text(json.dumps({"rows": saved}))
        again = row("one", "fp8gemm", "cpu", 2.0)
        assert models.merged([again], "old", directory=tmp_path) == [saved[2], again, saved[1]]
        assert models.merged([again], "none", directory=tmp_path) == [again]


def row(model: str, library: str, engine: str, error: float | None, **more: Any) -> dict[str, Any]:
    measured = {} if error is None else {"error": error, "worst": 2 * error, "score": 0.5, "agreement": 99.9}
    return {
        "model": model,
        "dtype": "bfloat16",
        "library": library,
        "scheme": "row",
        "engine": engine,
        **measured,
        **more,
    }


class TestPage:
    def content(self) -> dict[str, Any]:
        tiny = replace(case(), name="one"), replace(case(), name="two", dense=("a.*",), why="it is said")
        return {
            "processor": "a CPU",
            "date": "2026-01-01",
            "torch": "2.13",
            "libraries": {"sdnq": "1.0"},
            "models": [models.about(one) for one in tiny],
            "rows": [
                {**row("one", "unpatched", "", 0.0), "dtype": "float32"},
                row("one", "fp8gemm", "cpu", 0.05),
                row("two", "fp8gemm", "cpu", 0.01234),
                row("one", "fp8gemm", "vllm", None, reason="no such op"),
                row("two", "fp8gemm", "vllm", None, reason="no such op; nor another"),
                row("one", "sdnq", "", 0.1),
                row("two", "sdnq", "", None, reason="failed"),
            ],
        }

    def test_a_column_for_each_model(self) -> None:
        written = page.tables(self.content()).splitlines()
        assert "Measured on a CPU, 2026-01-01, with torch 2.13, sdnq 1.0." in written
        assert "| one | none | torch | none | 0.5000 (mean) |" in written
        assert "Dense where there are exceptions: `a.*` of two: it is said." in written
        assert "| library | scheme | engine | one | two |" in written
        assert "| fp8gemm | row | cpu | 5.00 / 10.0 | 1.23 / 2.5 |" in written
        assert "| fp8gemm | row | cpu | 0.5000 | 0.5000 |" in written
        assert "| sdnq | row |  | 10.00 / 20.0 | — |" in written
        assert not [line for line in written if line.startswith("| fp8gemm | row | vllm")]
        assert "* fp8gemm vllm (row), one, two: no such op" in written
        assert "* sdnq (row), two: failed" in written

    def test_only_the_tables_are_written(self, tmp_path: Path) -> None:
        (tmp_path / "new.json").write_text(json.dumps(self.content()))
        (tmp_path / "page.md").write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
        page.write("new", page=tmp_path / "page.md", directory=tmp_path)
        expected = f"before\n{page.BEGIN}\n\n{page.tables(self.content())}\n\n{page.END}\nafter\n"
        assert (tmp_path / "page.md").read_text() == expected

    def test_the_page_is_what_was_measured(self) -> None:
        content = json.loads((page.RESULTS / "quality_models_cpu.json").read_text())
        assert page.PAGE.read_text() == page.written(page.PAGE.read_text(), content)
        assert {about["name"] for about in content["models"]} == {one.name for one in models.CASES}
