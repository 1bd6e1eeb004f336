"""The regexes of configs: what Python's engine says, in a time that no pattern stretches."""

from __future__ import annotations

import random
import re
import time

import pytest

from fp8gemm import CheckpointError
from fp8gemm.formats import patterns
from fp8gemm.formats.patterns import matching

NAMES = ["model.layers.0.mlp.gate", "model.layers.11.mlp.up_proj", "lm_head", "model.lm_head_x", "", "a\nb"]


def test_names_and_expressions() -> None:
    """As compressed-tensors reads them: whole names, and expressions from the start on, not to the end."""
    assert matching(NAMES, ["lm_head"]) == ["lm_head"]
    assert matching(NAMES, ["re:.*lm_head"]) == ["lm_head", "model.lm_head_x"]
    assert matching(NAMES, ["re:mlp", "gate"]) == []
    assert matching(NAMES, []) == []


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*$",
        "(a|aa)+$",
        "([a-z]+)*x",
        "(.*a){20}x",
        ".*.*.*.*.*.*x",
        "((a*)*)*b",
        "(a|b|ab)*c(a?){50}x",
    ],
)
def test_no_expression_of_a_file_takes_long(pattern: str) -> None:
    start = time.perf_counter()
    for name in ("a" * 60 + "!", "ab" * 400):
        try:
            matching([name], [f"re:{pattern}"])
        except CheckpointError as error:
            assert "takes too long to match; list the modules" in str(error)  # noqa: PT017
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "(a|aa)+$", "([a-z]+)*x"])
def test_the_known_ones_are_answered(pattern: str) -> None:
    assert matching(["a" * 60 + "!", "a" * 60, "a" * 60 + "x"], [f"re:{pattern}"]) == (
        ["a" * 60 + "x"] if pattern.endswith("x") else ["a" * 60]
    )


@pytest.mark.parametrize("pattern", ["(", "*", "(?P<a", "[z-a]", "(" * 3000])
def test_what_is_no_expression(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="is no regular expression"):
        matching(["m"], [f"re:{pattern}"])


def test_names_that_are_no_strings() -> None:
    with pytest.raises(CheckpointError, match="must be strings, found 3"):
        matching(["m"], ["m", 3])  # type: ignore[list-item]


def test_what_cannot_be_followed_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="GROUPREF"):
        matching(["a" * 300], [r"re:(a+)+\1$"])


def random_pattern(source: random.Random, depth: int) -> str:
    simple = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "^", "$", r"\b", "ab", "(?i:A)" if depth else "b"]
    if depth == 0 or source.random() < 0.25:
        return source.choice(simple)
    one, other = random_pattern(source, depth - 1), random_pattern(source, depth - 1)
    forms = [f"{one}{other}", f"({one}|{other})", f"(?:{one}|{other})", f"({one})*", f"({one})+?", f"(?:{one})?"]
    forms += [f"({one}){{2}}", f"({one}){{1,3}}", f"(?={one}){other}", f"(?!{one}){other}", f"{one}(?<!a){other}"]
    return source.choice(forms)


def test_the_same_as_pythons_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small patterns, all followed by positions."""
    monkeypatch.setattr(patterns, "_MOST_WAYS", -1)
    patterns._expression.cache_clear()
    source = random.Random(0)
    checked = 0
    for _ in range(1500):
        pattern = random_pattern(source, 3)
        try:
            expected = re.compile(pattern)
        except re.error:
            continue
        for name in ("", "a", "ab", "ba", "aab", "a.b1", "bb.aa"):
            try:
                found = matching([name], [f"re:{pattern}"])
            except CheckpointError as error:
                assert "(?i" in pattern or "too long" in str(error), error  # noqa: PT017
                continue
            assert bool(found) == (expected.match(name) is not None), (pattern, name)
            checked += 1
    assert checked > 5000
    patterns._expression.cache_clear()
