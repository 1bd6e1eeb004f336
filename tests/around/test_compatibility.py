"""Every row of the compatibility table does what docs/compatibility.md says."""

from __future__ import annotations

import re

import compatibility
import pytest
from compatibility import PAGE, Trial

pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("trial", compatibility.trials(), ids=str)
def test_trial(trial: Trial) -> None:
    trial.check()


def test_the_page_has_these_rows() -> None:
    """Versions apart: the page names those that it was written with."""

    def unversioned(text: str) -> str:
        return re.sub(r"^## (\S+) \S+$", r"## \1", text, flags=re.MULTILINE)

    written, expected = unversioned(PAGE.read_text()), unversioned(compatibility.page(compatibility.trials()))
    assert written == expected, "run python tests/around/compatibility.py"


def test_a_wrong_row_is_noticed() -> None:
    def raise_other() -> None:
        raise ValueError("something else")

    for trial, words in (
        (Trial(library="torch", what="x", run=lambda: None, refused="no"), "was not refused"),
        (Trial(library="torch", what="x", run=raise_other, refused="no"), "in other words: something else"),
    ):
        with pytest.raises(AssertionError, match=words):
            trial.check()
    with pytest.raises(ValueError, match="something else"):
        Trial(library="torch", what="x", run=raise_other).check()
