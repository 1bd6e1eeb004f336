"""Pages in a real Chromium: light and dark, narrow and wide, nothing cut off sideways, nothing loaded.

Needs the program ``chromium`` (Debian: apt-get install chromium).
"""

from __future__ import annotations

import math
import re
import shutil
import struct
import subprocess
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fp8gemm import enable_fp8_gemm, measure, report
from fp8gemm.pages import Point, bars, element, facts, heat_map, nest, page, scatter, section, table, tree
from fp8gemm.pages.style import DARK, LIGHT

SCHEMES = {"dark": 0, "light": 1}  # of blink's preferredColorScheme
PROBE = """<script>parent.document.title = [innerWidth, document.documentElement.scrollWidth,
matchMedia("(prefers-color-scheme:dark)").matches, getComputedStyle(document.body).backgroundColor,
[...document.querySelectorAll("svg text")].filter(text => { const box = text.getBoundingClientRect();
return box.left < 0 || box.right > innerWidth; }).length].join("|")</script>"""
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
QUIET.append("--disable-features=NetworkTimeServiceQuerying")


def chromium(folder: Path, *options: str) -> str:
    """What a run of Chromium prints, with a profile of its own."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program is not None, "install Chromium: apt-get install chromium"
    profile = f"--user-data-dir={folder / 'profile'}"
    plain = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", profile, *QUIET]
    done = subprocess.run([program, *plain, *options], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def first_row(file: Path) -> list[tuple[int, ...]]:
    """The pixels of the top row of a PNG with 8 bits a channel (https://www.w3.org/TR/png-3/)."""
    data, at, parts = file.read_bytes(), 8, b""
    width = channels = 0
    while at < len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            width, channels = struct.unpack(">I", body[:4])[0], {2: 3, 6: 4}[body[9]]
            assert (body[8], body[12]) == (8, 0)
        parts += body if kind == b"IDAT" else b""
        at += 12 + size
    raw = zlib.decompress(parts)[: 1 + width * channels]
    row: list[int] = []
    for index, byte in enumerate(raw[1:]):  # the row above counts as zeros
        left = row[index - channels] if index >= channels else 0
        row.append((byte + {0: 0, 1: left, 2: 0, 3: left // 2, 4: left}[raw[0]]) % 256)
    return [tuple(row[start : start + 3]) for start in range(0, len(row), channels)]


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_block_with_a_long_name = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))
        self.router = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.a_block_with_a_long_name:
            x = layer(x)
        return self.router(x)  # type: ignore[no-any-return]


def real() -> str:
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(3, 64)
    errors = measure(model, x)
    enable_fp8_gemm(model, module_filter="!router")
    with torch.no_grad():
        model(x)
    return report(model).to_html(errors=errors)


def everything() -> str:
    """All parts, with long names and values of all kinds."""
    long = "a." * 40 + "x" * 90
    values = [[at * 1e9 if (at + column) % 5 else math.nan for column in range(20)] for at in range(20)]
    names = [f"role {at} of many" for at in range(20)]
    points = [Point(name=f"configuration {at}", x=1e9 * at, y=20 - at**0.5, chosen=at == 3) for at in range(10)]
    return page(
        long,
        facts({long: long, "a": "b"}),
        section(long, long, tree(nest([(f"{long}.{at}", 1e9, long) for at in range(3)]), open_levels=9)),
        section("Map", heat_map(rows=names, columns=names, values=values, corner="depth", caption=long)),
        section("Plot", scatter(points, x="bytes", y="SQNR in dB", front=["configuration 3", "configuration 1"])),
        section("Bars", bars({long: 1.0, "b": 1e9})),
        section("Table", table([f"column {at}" for at in range(20)], [[long, *[long] * 19], [*"a" * 19, "b"]])),
    )


@pytest.fixture(scope="module", params=[real, everything], ids=lambda made: made.__name__)
def html(request: Any) -> str:
    text: str = request.param()
    return text


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_page_fits_and_follows_the_colour_scheme(html: str, scheme: str, width: int, tmp_path: Path) -> None:
    wanted = DARK["page"] if scheme == "dark" else LIGHT["page"]
    look = [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--window-size={width},900"]
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    chromium(tmp_path, *look, f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "page.html").as_uri())
    row = first_row(tmp_path / "page.png")
    assert len(row) == width
    assert set(row) == {rgb(wanted)}
    probed = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", f"{PROBE}</body>")
    # A window of headless Chromium that writes its DOM has at least 500 pixels.
    frame = element("iframe", width=width, height=900, style="border:0", srcdoc=str(probed))
    outer = f'<!DOCTYPE html><title>none</title><meta name="color-scheme" content="light dark">{frame}'
    (tmp_path / "probed.html").write_text(outer, encoding="utf-8")
    dom = chromium(tmp_path, *look, "--dump-dom", (tmp_path / "probed.html").as_uri())
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found is not None
    inner, scrolled, dark, background, cut = found[1].split("|")
    assert (int(inner), dark) == (width, str(scheme == "dark").lower())
    assert int(scrolled) <= width
    assert background == f"rgb{rgb(wanted)}"
    assert cut == "0"


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, bytes], list[str]]]:
    """A server of pages by path, and what it was asked for, whatever the host."""
    pages: dict[str, bytes] = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path in pages else 404)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(pages.get(self.path, b""))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", pages, asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_page_loads_nothing(html: str, server: tuple[str, dict[str, bytes], list[str]], tmp_path: Path) -> None:
    """All hosts are mapped to a server that notes what it is asked for."""
    address, pages, asked = server
    pages["/page"] = html.encode()
    evil = '<img src="http://elsewhere.example/image"/>'
    pages["/bad"] = f"<!DOCTYPE html><title>a</title>{evil}".encode()
    pages["/guarded"] = html.replace("</body>", f"{evil}</body>").encode()
    mapped = f"--host-resolver-rules=MAP * {address}"

    def opened(path: str) -> set[str]:
        asked.clear()
        chromium(tmp_path, mapped, "--dump-dom", f"http://page.example{path}")
        return set(asked)

    assert opened("/page") == {"/page"}
    assert "/image" in opened("/bad")  # the check bites
    assert opened("/guarded") == {"/guarded"}  # by the page's policy


def test_the_pages_are_as_the_dom_says(tmp_path: Path) -> None:
    """Chromium closes and moves nothing: what it parses has the elements that were written."""
    text = everything()
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    dom = chromium(tmp_path, "--dump-dom", (tmp_path / "page.html").as_uri())
    for tag in ("section", "table", "tr", "td", "details", "svg", "circle", "line", "text", "rect", "p"):
        assert len(re.findall(rf"<{tag}[ >/]", dom)) == len(re.findall(rf"<{tag}[ >/]", text)), tag
