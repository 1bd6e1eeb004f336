"""The search for the fewest bytes: how few runs it takes, whatever is known beforehand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from fp8gemm.analysis.search import Layer, Search, most_runs


def test_the_search_takes_few_runs_whatever_the_order() -> None:
    """Three of forty layers are needed, and the sensitivities say the opposite of the truth."""
    needed = {"3", "17", "38"}
    sizes = {"row": 100, "block": 101, "original": 200}
    layers = [
        Layer(name=str(n), sizes=sizes, noise={"row": float(str(n) not in needed), "block": 0.5, "original": 0.0})
        for n in range(40)
    ]
    tried = []

    def meets(assignment: dict[str, Any]) -> bool:
        tried.append(assignment)
        return all(assignment[name] == "original" for name in needed)

    search = Search(layers, {layer.name: "row" for layer in layers}, meets)
    sequence = search.sequence()
    found = search.first_that_meets(sequence)
    found = search.take_back(found, list(reversed([layer.name for layer in layers])))
    assert {name for name, treatment in found.items() if treatment == "original"} == needed
    assert all(found[name] == "row" for name in found if name not in needed)
    assert len(tried) < 50 < most_runs(40, 3)


def test_the_most_noise_for_the_bytes_comes_first() -> None:
    layers = [
        Layer(name="big", sizes={"row": 1000, "original": 4000}, noise={"row": 0.4, "original": 0.0}),
        Layer(name="small", sizes={"row": 100, "original": 400}, noise={"row": 0.2, "original": 0.0}),
        Layer(name="head", sizes={"row": 100, "original": 400}, noise={"row": 0.2, "original": 0.0}, role="head"),
        Layer(name="free", sizes={"row": 100, "weight_only": 100}, noise={"row": 0.1, "weight_only": 0.0}),
        Layer(name="quiet", sizes={"row": 100, "original": 400}, noise={"row": 0.0, "original": 0.0}),
    ]
    search = Search(layers, {layer.name: "row" for layer in layers}, lambda assignment: False)
    steps = search.sequence()
    changed = [next(name for name in new if new[name] != old[name]) for old, new in pairwise(steps)]
    assert changed == ["free", "head", "small", "big", "quiet"]
    assert search.cost(steps[0]) == (1400, 0)
    assert search.cost(steps[1]) == (1400, 1)
    assert search.cost(steps[-1]) == (4000 + 3 * 400 + 100, 5)


def test_layers_get_what_is_between_if_that_is_enough() -> None:
    sizes = {"row": 100, "block": 110, "weight_only": 120, "original": 200}
    layers = [
        Layer(name=name, sizes=sizes, noise={key: 1.0 - 0.1 * place for place, key in enumerate(sizes)})
        for name in "ab"
    ]
    start = {"a": "row", "b": "row"}
    search = Search(layers, start, lambda assignment: assignment["b"] in ("weight_only", "original"))
    assert search.take_back({"a": "original", "b": "original"}, ["a", "b"]) == {"a": "row", "b": "weight_only"}
