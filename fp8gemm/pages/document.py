"""A whole page, its sections, and the few numbers at its top."""

from __future__ import annotations

from collections.abc import Mapping

from .markup import Html, element, escape
from .style import SHEET

# Nothing on a page may load anything or run a script, whatever text it was made from.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, *sections: str) -> Html:
    """A complete HTML document, which is well-formed XML too; a section that is plain text becomes a paragraph.

    Example:
        >>> text = page("A <model>", "Nothing to see.")
        >>> text.startswith("<!DOCTYPE html>"), "<title>A &lt;model&gt;</title>" in text, "Nothing to see.</p>" in text
        (True, True, True)
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>'),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        Html(f"<style>\n{SHEET}</style>"),
    )
    main = element("main", element("h1", title), *map(_block, sections))
    return Html(f"<!DOCTYPE html>\n{element('html', head, element('body', main), lang='en')}\n")


def section(title: str, *parts: str) -> Html:
    """A heading and what follows it; plain text becomes a paragraph.

    Example:
        >>> section("Sizes", "a < b")
        '<section><h2>Sizes</h2><p>a &lt; b</p></section>'
    """
    return element("section", element("h2", title), *map(_block, parts))


def facts(values: Mapping[str, str]) -> Html:
    """A few important numbers, each with what it counts.

    Example:
        >>> facts({"FP8 layers": "12"})
        '<dl class="facts"><div><dt>FP8 layers</dt><dd>12</dd></div></dl>'
    """
    pairs = (element("div", element("dt", name), element("dd", value)) for name, value in values.items())
    return element("dl", *pairs, class_="facts")


def _block(part: str) -> Html:
    return escape(part) if isinstance(part, Html) else element("p", part)
