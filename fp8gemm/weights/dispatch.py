"""The tables of handlers: for torch functions (above autograd) and for ATen operations (below autograd)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# The key None handles all other operations. A handler that returns NotImplemented passes the call on to it. Operations
# that other libraries register when they are imported have their names as keys.
# The other modules of this package register their handlers here.
FUNCTIONS: dict[Any, Callable[..., Any]] = {}
OPERATIONS: dict[Any, Callable[..., Any]] = {}


def implements(table: dict[Any, Callable[..., Any]], *functions: Any) -> Callable[[Callable[..., Any]], Any]:
    """Registers a handler for these functions or operations."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        table.update(dict.fromkeys(functions, handler))
        return handler

    return register
