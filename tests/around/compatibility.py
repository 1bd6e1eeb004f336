"""The compatibility table: what was tried with each library, and docs/compatibility.md, which is made from it.

A trial is a row of a list ``TRIALS`` in a module ``trials_*.py`` of this folder: what is done with the library, and a
function that does it and asserts that it is right. ``test_compatibility.py`` runs every row. ``python
tests/around/compatibility.py`` runs them, too, and writes the page if all of them do what they say.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "compatibility.md"
HEAD = """# Compatibility

What people put around a model, tried with the real libraries on small random models on a CPU;
[more than one process](distributed.md) has a page of its own. This page is written by
`python tests/around/compatibility.py`, which runs every row; [a test](../tests/around/test_compatibility.py) runs them
again and compares the page. *Refused* means that an error with these words is raised, **wrong** that the library itself
goes on with wrong values, where nothing of fp8gemm runs.
"""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One row: ``what`` is done with ``library`` (a distribution), and ``run``, which raises if it is not right.

    ``refused`` are words of the error that ``run`` raises instead; ``note`` says more about what works. ``wrong`` says
    what others make of it without an error, and what to do instead; ``run`` then asserts that they still do.
    """

    library: str
    what: str
    run: Callable[[], object]
    refused: str = ""
    note: str = ""
    wrong: str = ""

    def __str__(self) -> str:
        return f"{self.library}: {self.what}"

    @property
    def outcome(self) -> str:
        if self.refused or self.wrong:
            return f"*refused*: “{self.refused}”" if self.refused else f"**wrong**: {self.wrong}"
        return f"works: {self.note}" if self.note else "works"

    def check(self) -> None:
        """Runs the trial.

        Raises:
            AssertionError: it was not refused, or in other words; any other error is that of ``run``.
        """
        if not self.refused:
            self.run()
            return
        try:
            self.run()
        except Exception as error:
            said = " ".join(str(error).split())
            if self.refused in said:
                return
            raise AssertionError(f"{self} was refused in other words: {said}") from error
        raise AssertionError(f"{self} was not refused")


def trials() -> list[Trial]:
    """Every row, in the order of the modules' names."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    importlib.import_module("vision")  # first
    modules = [importlib.import_module(path.stem) for path in sorted(FOLDER.glob("trials_*.py"))]
    return [trial for module in modules for trial in module.TRIALS]


def page(rows: Iterable[Trial]) -> str:
    """The text of docs/compatibility.md, with the installed versions."""
    by_library: dict[str, list[Trial]] = {}
    for row in rows:
        by_library.setdefault(row.library, []).append(row)
    parts = [HEAD]
    for library, found in sorted(by_library.items()):
        parts.append(f"\n## {library} {metadata.version(library)}\n\n| what | outcome |\n|---|---|\n")
        parts += [f"| {row.what} | {row.outcome} |\n" for row in found]
    return "".join(parts)


def main() -> int:
    found, wrong = trials(), 0
    for trial in found:
        try:
            trial.check()
        except Exception:
            wrong += 1
            print(f"{trial}\n{traceback.format_exc()}", file=sys.stderr)
    if wrong:
        print(f"{wrong} of {len(found)} trials are wrong: {PAGE.name} is left as it is", file=sys.stderr)
        return 1
    PAGE.write_text(page(found))
    print(f"{len(found)} trials: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
