"""A strict block raises where a converted layer does not run on FP8, and lets nothing else happen."""

from __future__ import annotations

import re

import pytest
import torch
from branches import READS, X, branches, last
from torch import nn

from fp8gemm import report, strict
from fp8gemm.weights.activity import Counts


@torch.no_grad()
def test_strict_lets_right_models_pass_and_leaves_nothing() -> None:
    model = branches()
    before = dict(model._forward_hooks)
    with strict(model) as same:
        assert same is model
        model(X)
    assert dict(model._forward_hooks).keys() <= before.keys()
    with strict(model, allow_uncalled="head"):
        model(X, head=False)
    with strict(model):  # different passes may call different layers
        model(X, head=False)
        model.head(X)


@torch.no_grad()
def test_strict_raises_at_the_pass_that_went_wrong() -> None:
    model, done = branches(), []

    def run() -> None:
        with strict(model, allow_uncalled=True):
            done.append(model(X))
            model.head.register_forward_hook(lambda module, args, y: y + 0 * module.weight.norm())
            done.append(model(X))

    with pytest.raises(
        ValueError, match=re.escape(f"head: dequantized once, besides 2 times on FP8: {READS}")
    ) as caught:
        run()
    assert len(done) == 1
    assert str(caught.value).startswith("1 of 2 converted layers did not run on FP8 by the end of this forward pass:")
    assert not any(
        "strict" in type(getattr(hook, "__self__", hook)).__module__ for hook in model._forward_hooks.values()
    )


@torch.no_grad()
def test_strict_raises_at_the_end_of_the_block() -> None:
    model = branches()
    with pytest.raises(ValueError, match=r"in this block:\n  head: not called\nlayers that need not"), strict(model):
        model(X, head=False)
    with pytest.raises(ValueError, match=r"2 of 2 converted layers did not run on FP8 in this block"), strict(model):
        pass
    with pytest.raises(ValueError, match="head: dequantized once"), strict(model, allow_uncalled=True):
        model.head.weight.dequantize()
    with pytest.raises(ValueError, match="body: its weight was replaced"), strict(model, allow_uncalled=True):
        model.body._parameters["weight"] = nn.Parameter(torch.zeros(32, 32))


def test_strict_raises_nothing_in_place_of_another_error() -> None:
    model = branches()
    with pytest.raises(KeyError, match="mine"), strict(model):
        raise KeyError("mine")
    with (
        pytest.raises(ValueError, match=r"allow_uncalled='x\*' matches no converted layer"),
        strict(model, allow_uncalled="x*"),
    ):
        raise AssertionError("the block has run")
    with pytest.raises(ValueError, match="no FP8 weights to watch"), strict(nn.Linear(3, 3)):
        pass


@torch.no_grad()
def test_compiled_passes_are_seen_by_strict() -> None:
    model = branches()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with strict(model):
        compiled(X)
    with strict(compiled):
        compiled(X)
    assert [row.name for row in report(compiled).rows] == ["body", "head"]
    model.reads = True
    with pytest.raises(ValueError, match="  body: not called"), strict(compiled):  # as docs/limits.md says
        compiled(X)
    model.reads = False
    with pytest.raises(ValueError, match="head: not called"), strict(model):
        compiled(X, head=False)
    assert last(model) == {"body": None, "head": None}
    with pytest.raises(ValueError, match=r"not compiled, first; for compiled models use fp8gemm.strict\(model\)"):
        report(model).check()


@torch.no_grad()
def test_each_pass_of_a_compiled_model_is_checked() -> None:
    model, done = branches(), []
    compiled = torch.compile(model, backend="aot_eager")

    def run() -> None:
        with strict(compiled):
            done.append(compiled(X))
            model.head.weight.dequantize()
            done.append(compiled(X))

    with pytest.raises(ValueError, match="by the end of this forward pass:\n  head: dequantized once, besides"):
        run()
    assert len(done) == 1


@torch.no_grad()
def test_compiled_blocks_of_an_eager_model_are_counted() -> None:
    model = branches()
    model.body = torch.compile(model.body, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        model(X)
        assert list(last(model).values()) == [Counts(fp8=1), Counts(fp8=1)]
