"""What handles which function of torch's, and which operation below autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# The operation None takes all others. A handler gives NotImplemented for what it leaves to them. Filled by the files
# beside this one.
FUNCTIONS: dict[Any, Callable[..., Any]] = {}
OPERATIONS: dict[Any, Callable[..., Any]] = {}


def implements(table: dict[Any, Callable[..., Any]], *functions: Any) -> Callable[[Callable[..., Any]], Any]:
    """Registers a handler for these functions or operations."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        table.update(dict.fromkeys(functions, handler))
        return handler

    return register
