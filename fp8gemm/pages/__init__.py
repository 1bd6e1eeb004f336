"""Self-contained HTML pages: tables, trees, heat maps and plots as inline SVG.

Every function returns HTML. A plain string given to one is text and gets escaped; only what these functions return does
not.
"""

from .document import facts, page, section
from .grid import heat_map
from .markup import Html, element, escape
from .nodes import Node, nest, tree
from .numbers import number, size, ticks
from .plot import Point, scatter
from .tables import bars, table

__all__ = [
    "Html",
    "Node",
    "Point",
    "bars",
    "element",
    "escape",
    "facts",
    "heat_map",
    "nest",
    "number",
    "page",
    "scatter",
    "section",
    "size",
    "table",
    "ticks",
    "tree",
]
