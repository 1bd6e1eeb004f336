"""Tables as plain text."""

from __future__ import annotations

from fp8gemm.text import columns


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert columns([("a", "bb", ""), ("ccc", "d", "e")]) == ["a    bb", "ccc  d   e"]
    assert columns([("a", "1"), ("bbb", "22")], right=1) == ["a     1", "bbb  22"]
    assert columns([]) == []


def test_short_rows_may_end_in_longer_cells() -> None:
    assert columns([("a", "b"), ("a longer cell",)]) == ["a  b", "a longer cell"]
    assert columns([("a", "b", "c"), ("dd", "and more than fits")]) == ["a   b  c", "dd  and more than fits"]
