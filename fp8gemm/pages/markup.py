"""Text that is HTML already, and text that becomes HTML by being escaped."""

from __future__ import annotations

import html
import re

# XML allows no control characters but these three, and lone surrogates have no UTF-8.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Html(str):
    """A string that is HTML already, so that it is not escaped again; every other string is text.

    Example:
        >>> escape("a < b"), escape(Html("<b>a</b>"))
        ('a &lt; b', '<b>a</b>')
    """

    __slots__ = ()


def escape(text: str) -> Html:
    """``text`` for use in an element or a quoted attribute; characters that XML forbids become U+FFFD."""
    return text if isinstance(text, Html) else Html(html.escape(_FORBIDDEN.sub("\ufffd", text)))


def breakable(text: str) -> Html:
    """``text`` with places after dots where a line may be broken, as names of layers have no spaces.

    Example:
        >>> breakable("a.b")
        'a.<wbr/>b'
    """
    return text if isinstance(text, Html) else Html(re.sub(r"\.(?=.)", ".<wbr/>", escape(text)))


def element(tag: str, *content: str, **attributes: str | float | None) -> Html:
    """One element. ``class_`` is the attribute ``class``, ``_`` in other names is ``-``; None leaves an attribute out.

    Example:
        >>> element("text", "a", class_="b", text_anchor="end")
        '<text class="b" text-anchor="end">a</text>'
    """
    pairs = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    opening = "".join(f' {name}="{escape(str(_plain(value)))}"' for name, value in pairs)
    if not content and tag in _VOID:
        return Html(f"<{tag}{opening}/>")
    return Html(f"<{tag}{opening}>{''.join(map(escape, content))}</{tag}>")


_VOID = frozenset({"br", "circle", "col", "line", "meta", "rect", "wbr"})


def _plain(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
