"""Pages are well-formed, escape every text, load nothing, and show what is missing."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from fp8gemm import pages
from fp8gemm.pages import Html, Node, Point, bars, element, facts, heat_map, nest, page, scatter, section, table, tree
from fp8gemm.pages.style import DARK, LIGHT, STEPS, _variables

EVIL = "<script>alert(1)</script> \" ' & \x00\x1b\udc80"
INSIDE = "<script>alert(1)</script> \" ' & \ufffd\ufffd\ufffd"  # what a reader sees of it
FINE = [float("nan"), math.inf, -math.inf, 0.0, -1e-30, 1e300, 5e-324, 3]
MODULES = [importlib.import_module(f"fp8gemm.pages.{found.name}") for found in pkgutil.iter_modules(pages.__path__)]

PARTS: dict[str, Callable[[str], str]] = {
    "text": lambda text: text,
    "section": lambda text: section(text, text),
    "facts": lambda text: facts({text: text}),
    "table": lambda text: table([text], [[text]], caption=text),
    "bars": lambda text: bars({text: 1.0}, text=lambda _: text, caption=text),
    "tree": lambda text: tree([Node(name=text, note=text, children=(Node(name=text),))], text=lambda _: text),
    "heat map": lambda text: heat_map(
        rows=[text], columns=[text], values=[[1.0]], corner=text, caption=text, text=lambda _: text
    ),
    "scatter": lambda text: scatter(
        [Point(name=text, x=1, y=1, chosen=True), Point(name=f"{text}.", x=math.nan, y=1)],
        x=text,
        y=text,
        front=[text],
        x_text=lambda _: text,
        y_text=lambda _: text,
        caption=text,
    ),
}


class Strict(HTMLParser):
    """Collects tags and attributes, and checks that each element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(text: str) -> ET.Element:
    """The page as XML, after it was read as HTML too; it can be written as UTF-8, and nothing in it loads or runs."""
    text.encode()
    strict = Strict()
    strict.feed(text)
    assert strict.open == []
    for tag, attributes in strict.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "use"}
        assert not {"src", "href", "srcset", "action", "background"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert text.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def texts(root: ET.Element, tag: str, kind: str | None = None) -> list[str]:
    return ["".join(found.itertext()) for found in root.iter(tag) if kind is None or found.get("class") == kind]


@pytest.mark.parametrize("name", PARTS)
def test_every_text_is_escaped(name: str) -> None:
    root = parsed(page(EVIL, PARTS[name](EVIL)))
    assert texts(root, "title")[0] == texts(root, "h1")[0] == INSIDE
    (main,) = root.iter("main")
    shown = ["".join(main.itertext()), *(value for found in main.iter() for value in found.attrib.values())]
    assert sum(text.count(INSIDE) for text in shown) > 1
    assert not any("\\x" in text or "&lt;" in text for text in shown)


def test_the_check_of_pages_bites() -> None:
    for bad in ("<script></script>", '<img src="x"/>', '<p onclick="x"></p>', "<b><i></b></i>", "<b>", "<b/>url(x)"):
        with pytest.raises((AssertionError, ET.ParseError, IndexError)):
            parsed(page("", Html(bad)))


def test_only_html_is_left_as_it_is() -> None:
    assert section("<", Html("<b>x</b>"), "<b>") == "<section><h2>&lt;</h2><b>x</b><p>&lt;b&gt;</p></section>"
    assert isinstance(table(["a"], []), Html)
    assert element("p", Html("<b/>"), title=Html('"<b/>')) == '<p title="&quot;&lt;b/&gt;"><b/></p>'
    assert parsed(page("a", section("b", table(["c"], [["d"]])))).findall("body/main/section/div/table/tbody/tr/th")


def test_the_page_declares_what_a_browser_needs() -> None:
    metas = [found.attrib for found in parsed(page("A")).iter("meta")]
    assert {"charset": "utf-8"} in metas
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    policy = next(meta["content"] for meta in metas if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "@media (prefers-color-scheme:dark)" in page("A")


def test_tables_align_columns_of_numbers_and_leave_gaps() -> None:
    root = parsed(page("", table(["name", "calls", "what"], [["a", 3, "x"], ["b", None, 4.0]])))
    assert texts(root, "th") == ["name", "calls", "what", "a", "b"]
    assert texts(root, "td") == ["3", "x", "", "4"]
    assert texts(root, "td", "number") == ["3", ""]
    assert texts(parsed(page("", table(["a", "b", "c"], [["x", "148.99 kB", "w " * 9]]))), "td", "short") == [
        "148.99 kB"
    ]
    with pytest.raises(ValueError, match=r"a row has 1 cells, expected 2, one for each of \['a', 'b'\]"):
        table(["a", "b"], [["c"]])


def test_bars_are_as_long_as_their_values() -> None:
    root = parsed(page("", bars({"a": 1.0, "b": 4.0, "c": 0.0, "d": math.nan, "e": math.inf}, text=pages.size)))
    assert [found.get("width") for found in root.iter("rect")] == ["25%", "100%", "0%", "0%", "100%"]
    assert texts(root, "td", "number") == ["1 B", "4 B", "0 B", "NaN", "∞"]
    assert "width" in bars({"a": 0.0})
    with pytest.raises(ValueError, match="the bar of 'a' is -1, expected at least 0"):
        bars({"a": -1})


def test_a_tree_adds_sizes_up_and_folds() -> None:
    nodes = nest([("a.b.c", 1, "x"), ("d", 10, ""), ("a.b", 2, "y"), ("a.e", 4, "z")])
    assert [(node.name, node.amount, node.total) for node in nodes] == [("a", 0, 7), ("d", 10, 10)]
    assert [(node.name, node.total, node.note) for node in nodes[0].children] == [("b", 3, "y"), ("e", 4, "z")]
    root = parsed(page("", tree(nodes)))
    assert [found.get("open") for found in root.iter("details")] == ["open", None]
    assert texts(root, "span", "size") == ["7 B", "3 B", "1 B", "4 B", "10 B"]
    assert texts(root, "span", "note") == ["y", "x", "z"]
    assert nest([]) == ()
    (joined,) = nest([("a.b.c", 1, "x"), ("a.b.d.e", 2, "y")])
    assert (joined.name, joined.total, [child.name for child in joined.children]) == ("a.b", 3, ["c", "d.e"])


def test_a_heat_map_shows_each_value_and_what_is_missing() -> None:
    values = [[0.0, 8.0, None], [4.0, math.nan, math.inf], [-math.inf, 7.9, 0.1]]
    root = parsed(page("", heat_map(rows=["0", "1", "2"], columns=["q", "k", "v"], values=values, corner="depth")))
    (table_,) = root.iter("table")
    assert texts(table_, "th") == ["depth", "q", "k", "v", "0", "1", "2"]
    cells = [(found.text, found.get("class")) for found in table_.iter("td")]
    assert cells[:3] == [("0", "s0"), ("8", "s8"), (None, "none")]
    assert cells[3:6] == [("4", "s4"), ("NaN", "nan"), ("∞", "s8")]
    assert cells[6:] == [("-∞", "s0"), ("7.9", "s8"), ("0.1", "s0")]
    legend = next(found for found in root.iter("div") if found.get("class") == "legend")
    assert [found.text for found in legend if found.text] == ["0", "8", "NaN", "no value"]
    assert [found.get("class") for found in legend[1]] == [f"s{step}" for step in range(9)]


def test_the_strong_end_of_a_heat_map_can_be_that_of_low_values() -> None:
    low = parsed(page("", heat_map(rows=["0"], columns=["q", "k"], values=[[0.0, 8.0]], strong="low")))
    assert [found.get("class") for found in low.iter("td")] == ["s8", "s0"]
    legend = next(found for found in low.iter("div") if found.get("class") == "legend")
    assert [found.get("class") for found in legend[1]] == [f"s{step}" for step in reversed(range(9))]
    assert [found.text for found in legend if found.text] == ["0", "8"]


@pytest.mark.parametrize("value", FINE)
def test_any_number_can_be_drawn(value: float) -> None:
    for values in ([[value]], [[value, value]], [[value, 1.0]], [[None, value, -1e308]], [[]], []):
        rows, columns = [str(index) for index in range(len(values))], [str(i) for i in range(len((values or [[]])[0]))]
        drawn = heat_map(rows=rows, columns=columns, values=values)
        parsed(page("", drawn))
        assert "no value" in drawn or None not in (values or [[]])[0]
    points = [Point(name="a", x=value, y=value), Point(name="b", x=1, y=value), Point(name="c", x=1, y=2)]
    for count in range(4):
        root = parsed(page("", scatter(points[:count], x="x", y="y", front=["a"][:count])))
        circles = list(root.iter("circle"))
        assert len(circles) == sum(abs(point.x) + abs(point.y) < 1e300 for point in points[:count])
        for circle in circles:
            assert 0 <= float(circle.get("cx", "").rstrip("%")) <= 100
            assert 0 <= float(circle.get("cy", "").rstrip("%")) <= 100


def test_a_heat_map_needs_all_values() -> None:
    with pytest.raises(ValueError, match=r"values are 1 x \[1\], expected 2 rows of 1 columns"):
        heat_map(rows=["a", "b"], columns=["c"], values=[[1.0]])
    with pytest.raises(ValueError, match=r"values are 2 x \[1, 2\], expected 2 rows of 2 columns"):
        heat_map(rows=["a", "b"], columns=["c", "d"], values=[[1.0, 2.0], [1.0]])


def test_a_plot_places_points_joins_the_front_and_marks_the_chosen_one() -> None:
    points = [
        Point(name="a", x=0, y=0),
        Point(name="b", x=100, y=40, chosen=True),
        Point(name="c", x=50, y=10),
        Point(name="lost", x=math.nan, y=1),
    ]
    root = parsed(page("", scatter(points, x="MB", y="dB", front=["b", "a"])))
    circles = {"".join(found.itertext()): found for found in root.iter("circle")}
    assert {name: (found.get("cx"), found.get("cy")) for name, found in circles.items()} == {
        "a": ("0%", "100%"),
        "b": ("100%", "0%"),
        "c": ("50%", "75%"),
    }
    assert {name: found.get("class") for name, found in circles.items()} == {"a": "on", "b": "chosen", "c": None}
    (front,) = [found for found in root.iter("line") if found.get("class") == "front"]
    assert [front.get(name) for name in ("x1", "y1", "x2", "y2")] == ["0%", "100%", "100%", "0%"]
    assert "Not drawn: lost (NaN, 1)" in texts(root, "p")
    words = texts(root, "text")
    assert [word for word in words if word.isdigit()] == ["0", "50", "100", "0", "10", "20", "30", "40"]
    assert {"MB", "dB", "a", "b", "c"} <= set(words)
    crowd = [Point(name=str(index), x=index, y=index, chosen=index == 5) for index in range(13)]
    shown = parsed(page("", scatter(crowd, x="x", y="y", front=["2"])))
    labels = [
        found.text
        for found in shown.iter("text")
        if (found.get("class") or "").startswith("label") and found.get("class") != "label axis"
    ]
    assert labels == ["2", "5"]


def test_a_plot_needs_names_that_are_there_and_different() -> None:
    with pytest.raises(ValueError, match=r"the front names \['b'\], which are not points; those are \['a'\]"):
        scatter([Point(name="a", x=1, y=1)], x="x", y="y", front=["b"])
    with pytest.raises(ValueError, match="points of a plot need different names"):
        scatter([Point(name="a", x=1, y=1)] * 2, x="x", y="y")


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.1, 0.35), (-3, 3), (7, 7), (0, 0), (1e9, 1.2e9), (-2e-9, 5e-9), (5e-324, 5e-324), (1, 1 + 1e-15)],
)
def test_ticks_are_few_and_cover_the_range(low: float, high: float) -> None:
    found = pages.ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 2 <= len(found) <= 6
    steps = [b - a for a, b in pairwise(found)]
    assert max(steps) == pytest.approx(min(steps))
    assert f"{steps[0]:.6e}"[0] in "125"


def luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio"""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("colours", "steps"), [(LIGHT, STEPS), (DARK, STEPS[::-1])])
def test_text_can_be_read_on_every_colour(colours: dict[str, str], steps: tuple[str, ...]) -> None:
    for name in ("text", "faint", "accent", "chosen"):
        assert contrast(colours[name], colours["page"]) >= 4.5
        assert contrast(colours[name], colours["panel"]) >= 4.5
    variables = dict(re.findall(r"--(\w+):(#\w+);", _variables(colours, steps)))
    for index in range(len(STEPS)):
        assert contrast(variables[f"s{index}"], variables[f"t{index}"]) >= 4.5


def test_the_colour_scale_grows_darker_step_by_step() -> None:
    lights = [luminance(step) for step in STEPS]
    assert lights == sorted(lights, reverse=True)
    assert len(set(lights)) == 9


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples_in_docstrings(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]
