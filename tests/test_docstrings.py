"""Every public name has a docstring with an example that runs."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp8gemm

PUBLIC = {name: getattr(fp8gemm, name) for name in fp8gemm.__all__ if callable(getattr(fp8gemm, name))}


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_in_docstrings(name: str) -> None:
    """The output is as printed, except for the whitespace of tensors."""
    thing = PUBLIC[name]
    names = {**vars(inspect.getmodule(thing)), "torch": torch, "nn": nn, "F": F}
    found = doctest.DocTestFinder(recurse=False).find(thing, name, globs=names)
    examples = [example for test in found for example in test.examples]
    assert examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, verbose=False)
    said: list[str] = []
    for test in found:
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
