"""The user's selection of layers, by patterns over their names or by a callable."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable

from torch import nn

ModuleFilter = Callable[[str, nn.Module], bool] | str | Iterable[str]


class Filter:
    """The user's selection of layers, and which of its patterns have matched."""

    def __init__(self, module_filter: ModuleFilter | None) -> None:
        self.chosen = module_filter if callable(module_filter) else None
        patterns: list[str] = []
        if isinstance(module_filter, str):
            patterns = [module_filter]
        elif module_filter is not None and not callable(module_filter):
            patterns = list(module_filter)
        self.included = [pattern for pattern in patterns if not pattern.startswith("!")]
        self.excluded = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
        self.hits: Counter[str] = Counter()

    def reason(self, name: str, module: nn.Module) -> str:
        """Why a layer is excluded; empty if it is selected."""
        if self.chosen is not None:
            return "" if self.chosen(name, module) else "module_filter"
        included = [pattern for pattern in self.included if fnmatch.fnmatchcase(name, pattern)]
        excluded = [pattern for pattern in self.excluded if fnmatch.fnmatchcase(name, pattern)]
        self.hits.update(included + excluded)
        if excluded:
            return f"module_filter: !{excluded[0]}"
        return "" if included or not self.included else "module_filter"

    def reason_of_tied(self, places: list[tuple[str, nn.Module]]) -> str:
        """Why a weight that several layers share is excluded: a pattern that names one of them selects it; a pattern
        that excludes one of them, or a callable that returns False, does not."""
        reasons = [self.reason(name, module) for name, module in places]
        against = [reason for reason in reasons if reason]
        excluded = [reason for reason in against if self.chosen is not None or "!" in reason]
        return excluded[0] if excluded else "" if len(against) < len(reasons) else against[0]

    def exclusion(self, name: str) -> str:
        """Why an occurrence that is converted along with a layer is excluded; empty if nothing excludes it."""
        excluded = [pattern for pattern in self.excluded if fnmatch.fnmatchcase(name, pattern)]
        self.hits.update(excluded)
        return f"module_filter: !{excluded[0]}" if excluded else ""

    def names(self, name: str, module: nn.Module) -> bool:
        """Whether the user selected this layer explicitly, rather than only not excluding it."""
        if self.chosen is not None:
            return bool(self.chosen(name, module))
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.included)

    def unmatched(self) -> list[str]:
        patterns = [*self.included, *(f"!{pattern}" for pattern in self.excluded)]
        return [pattern for pattern in patterns if not self.hits[pattern.removeprefix("!")]]
