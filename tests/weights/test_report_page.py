"""The page of a report: what each section shows, with and without errors."""

from __future__ import annotations

import json
import math
import re
import runpy
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fp8gemm import Report, enable_fp8_gemm, measure, report
from fp8gemm.weights.rows import Row

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
EVIL = "<script>alert('1')</script>"


@dataclass(frozen=True)
class Error:
    name: str
    sqnr: float = 30.0
    worst: float = 20.0
    p50: float = 31.0
    p1: float = 25.0
    role: str = ""
    depth: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Errors:
    layers: tuple[Error, ...]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block() for _ in range(blocks)]), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor, head: bool = True) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x) if head else x  # type: ignore[no-any-return]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return enable_fp8_gemm(Model().eval(), module_filter="!blocks.1.up")


def sections(text: str) -> dict[str, ET.Element]:
    root = ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    return {found[0].text or "": found for found in root.iter("section")}


def facts(text: str) -> dict[str, str]:
    found = re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", text)
    return dict(found)


def cells(found: ET.Element, table: int = 0) -> list[list[str]]:
    tables = list(found.iter("table"))
    return [["".join(cell.itertext()) for cell in row] for row in tables[table].iter("tr")]


@torch.no_grad()
def test_a_report_that_ran(model: Any, tmp_path: Path) -> None:
    model(X)
    model(X)
    text = report(model).to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text
    found = sections(text)
    assert list(found) == ["Sizes by depth", "Layers", "Kept dense, and why", "On FP8"]
    shown = facts(text)
    assert shown["weights on FP8"] == "6 of 7"
    assert shown["last forward pass"] == "all layers on FP8"
    assert shown["multiply-adds on FP8"] == f"{100 * report(model).coverage.share:.2f} %"  # type: ignore[union-attr]
    assert cells(found["Kept dense, and why"])[1] == ["blocks.1.up", "96x64", "24.58 kB", "module_filter: !blocks.1.up"]
    assert cells(found["Sizes by depth"]) == [
        ["depth", "up", "down", "head"],
        ["0", "6.53 kB", "6.40 kB", ""],
        ["1", "24.58 kB", "6.40 kB", ""],
        ["2", "6.53 kB", "6.40 kB", ""],
        ["outside of blocks", "", "", "1.09 kB"],
    ]
    notes = ["".join(span.itertext()) for span in found["Layers"].iter("span") if span.get("class") == "note"]
    assert notes[0].startswith("96x64, FP8, ")
    assert notes[0].endswith(", called 2 times")
    assert notes[2] == "96x64, kept: module_filter: !blocks.1.up"
    header, first, *_ = cells(found["On FP8"])
    line = dict(zip(header, first, strict=True))
    assert (line["layer"], line["calls"], line["dequantized"], line["before"]) == ("blocks.0.up", "2", "0", "24.58 kB")


@torch.no_grad()
def test_what_did_not_run_is_at_the_top(model: Any) -> None:
    model(X, head=False)
    model.blocks[0].up.weight.dequantize()
    text = report(model).to_html()
    assert facts(text)["last forward pass"] == "1 layer not on FP8"
    assert next(iter(sections(text))) == "Not on FP8 in the last forward pass"
    assert cells(sections(text)["Not on FP8 in the last forward pass"]) == [["layer", "what"], ["head", "not called"]]
    assert ", dequantized once" in text


def test_a_report_that_has_not_run(model: Any) -> None:
    text = report(model).to_html()
    assert set(facts(text)) == {"weights on FP8", "size", "engine"}
    assert "calls" not in text


@torch.no_grad()
def test_errors_are_heat_maps(model: Any) -> None:
    model(X)
    names = [row.name for row in report(model).rows]
    layers = [
        Error(name, sqnr=10.0 + at, depth=None if name == "head" else int(name.split(".")[1]))
        for at, name in enumerate(names)
    ]
    layers[1] = Error(names[1], sqnr=math.nan, depth=0)
    layers[4] = Error(names[4], depth=2, reason="these inputs do not reach it")
    text = report(model).to_html(errors=Errors((*layers, Error("elsewhere"))))
    found = sections(text)
    assert list(found) == ["Errors by depth", "Layers", "Kept dense, and why", "On FP8"]
    assert cells(found["Errors by depth"]) == [
        ["depth", "up", "down", "head"],
        ["0", "10.0", "NaN", ""],
        ["1", "", "13.0", ""],
        ["2", "", "15.0", ""],
        ["outside of blocks", "", "", "16.0"],
    ]
    assert cells(found["Errors by depth"], 1)[1] == ["0", "20.0", "20.0", ""]
    header, first, *_ = cells(found["On FP8"])
    assert dict(zip(header, first, strict=True))["SQNR dB"] == "10.0"
    with pytest.raises(ValueError, match=r"errors are of other layers \(elsewhere\) than the report \(blocks.0.down, "):
        report(model).to_html(errors=Errors((Error("elsewhere"),)))


def test_what_measure_finds_fits() -> None:
    dense = Model().eval()
    errors = measure(dense, X)
    text = report(enable_fp8_gemm(dense)).to_html(errors=errors)
    map_ = cells(sections(text)["Errors by depth"])
    assert [line[0] for line in map_] == ["depth", "0", "1", "2", "outside of blocks"]
    wanted = {layer.name: f"{layer.sqnr:.1f}" for layer in errors.layers}
    assert map_[1][1:3] == [wanted["blocks.0.up"], wanted["blocks.0.down"]]


def row(name: str, **more: Any) -> Row:
    return Row(name=name, status="fp8", shape=(8, 8), bytes_before=128, bytes_after=64, **more)


def test_many_kinds_of_layers_are_grouped() -> None:
    rows = tuple(row(f"m.{at}.{'attn' if kind < 8 else 'mlp'}.part{kind}") for at in range(2) for kind in range(16))
    found = cells(sections(Report(rows).to_html())["Sizes by depth"])
    assert found[0] == ["depth", "attn", "mlp"]
    assert found[1] == ["0", "512 B", "512 B"]
    errors = Errors(tuple(Error(one.name, depth=0, sqnr=float(at), role="router") for at, one in enumerate(rows)))
    assert cells(sections(Report(rows).to_html(errors=errors))["Errors by depth"])[:2] == [
        ["depth", "router"],
        ["0", "0.0"],
    ]


def test_experts_share_a_cell() -> None:
    rows = tuple(row(f"m.{at}.experts.{expert}.up") for at in range(2) for expert in range(3))
    assert cells(sections(Report(rows).to_html())["Sizes by depth"])[:2] == [["depth", "experts.*.up"], ["0", "192 B"]]
    found = tuple(Error(one.name, sqnr, depth=0) for one, sqnr in zip(rows, (30.0, math.nan, 20.0), strict=False))
    drawn = cells(sections(Report(rows).to_html(errors=Errors(found)))["Errors by depth"])
    assert drawn[1] == ["0", "NaN"]  # not the smallest of the others


def test_names_are_escaped() -> None:
    rows = (row(f"a.0.{EVIL}", ties=(EVIL,)), row(f"a.1.{EVIL}"), Row(name=EVIL, status="kept", shape=(), reason=EVIL))
    text = Report(rows).to_html(errors=Errors((Error(f"a.0.{EVIL}", role=EVIL, depth=0),)))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def test_empty_reports_and_large_ones() -> None:
    assert "0 of 0" in Report(()).to_html()
    large = Report(tuple(row(f"layers.{at}.mlp.up") for at in range(500)))
    assert sections(large.to_html())["Layers"].findall(".//details[@open]") == []


@torch.no_grad()
def test_json(model: Any, tmp_path: Path) -> None:
    model(X)
    text = report(model).to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text + "\n"
    found = json.loads(text)
    assert found == json.loads(json.dumps(report(model).to_dict()))
    assert found["rows"][0]["last"] == {"fp8": 1, "kept": 0, "dequantizations": 0}


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / "report.html")])
    runpy.run_path(str(examples / "report.py"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("99.88 % of ")
    assert lines[-1].startswith("  encoder.layer.0.intermediate.dense: dequantized once")
    assert next(iter(sections((tmp_path / "report.html").read_text(encoding="utf-8")))) == "Errors by depth"
