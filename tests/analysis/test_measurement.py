"""What a measurement shows: tables, pages and files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch import nn

from fp8gemm import LayerError, Measurement, measure
from fp8gemm.analysis.measurement import OutputError


def test_pages_show_depths_and_parts() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"<up>": nn.Linear(32, 32)}) for _ in range(2)),
                           "head": nn.Linear(32, 8), "idle": nn.Linear(8, 8)})  # fmt: skip
    model.forward = lambda x: model["head"](model["blocks"][1]["<up>"](model["blocks"][0]["<up>"](x)))
    found = measure(model, torch.randn(3, 32), module_filter="!head")
    assert [layer.depth for layer in found.layers] == [0, 1, None]
    page = found.to_html()
    text = [f"{layer.sqnr:.1f}" for layer in found.worst()]
    assert all(page.count(f">{value}</td>") >= 2 for value in text)  # in the heat map and in the table
    assert [part in page for part in ("&lt;up&gt;", "these inputs do not reach it", "module_filter: !head")] == [
        True
    ] * 3
    assert "<up>" not in page


def test_what_is_written(tmp_path: Path) -> None:
    found = measure(nn.Linear(64, 32), torch.randn(3, 64))
    assert found.to_json(tmp_path / "found.json") + "\n" == (tmp_path / "found.json").read_text()
    assert json.loads(found.to_json()) == found.to_dict()
    assert found.to_html(tmp_path / "found.html") == (tmp_path / "found.html").read_text()


def test_tables_begin_with_the_worst_layer() -> None:
    def row(name: str, **figures: float) -> LayerError:
        return LayerError(name=name, shape=(8, 8), calls=1, tokens=3, outlier_channels=(4,), **figures)

    rows = (row("a", sqnr=30.0, p50=20.0), row("b", sqnr=25.5, p50=28.0, saturated=0.0125),
            LayerError(name="c", shape=(8, 8), reason="these inputs do not reach it"))  # fmt: skip
    output = OutputError(tokens=3, sqnr=20.0, p50=19.0, p1=math.inf, worst=18.0)
    found = Measurement(layers=rows, output=output, kept={"d": "module_filter"})
    lines = [" ".join(line.split()) for line in str(found).splitlines()]
    assert lines[2:] == [
        "b 8x8 3 25.5 28.0 nan nan 1 channel 1.2 %",
        "a 8x8 3 30.0 20.0 nan nan 1 channel",
        "c 8x8 these inputs do not reach it",
        "the model's output 3 20.0 19.0 exact 18.0",
        "1 other matrix stays dense",
    ]
    assert [layer.name for layer in found.worst(1, by="p50")] == ["a"]
    with pytest.raises(ValueError, match="by must be one of sqnr, p50, p1, worst, found 'mean'"):
        found.worst(by="mean")


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(32, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).argmax(-1)


def test_models_without_a_floating_point_output() -> None:
    found = measure(Decides(), torch.randn(3, 32))
    assert (found.output.tokens, found.to_dict()["output"]["sqnr"]) == (0, None)
    assert str(found).endswith("no floating-point tensor")
    assert "SQNR of the model" not in found.to_html()
    idle = measure(Decides(), torch.randn(3, 32), module_filter="idle")
    assert idle.worst() == ()
    assert "these inputs do not reach it" in idle.to_html()


def test_the_example(tmp_path: Path) -> None:
    """Real weights: the median token finds the layers whose sums one large token dominates."""
    script, page = Path(__file__).parents[2] / "examples" / "measure.py", tmp_path / "page.html"
    done = subprocess.run([sys.executable, script, page], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("weight row, activation row on reference\n")
    assert "median token worst: encoder.layer.0.output.dense 2" in done.stdout
    root = ElementTree.fromstring(page.read_text().removeprefix("<!DOCTYPE html>"))
    heat = next(table for table in root.iter("table") if table.get("class") == "heat")
    head, *lines = [["".join(cell.itertext()) for cell in line] for line in heat.iter("tr")]
    assert head[:3] == ["depth", "attention.self.query", "attention.self.key"]
    assert [line[0] for line in lines] == ["0", "1", "2", "3", "4", "5", "outside of blocks"]
