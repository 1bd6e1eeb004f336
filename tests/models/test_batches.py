"""Example inputs: what counts as one batch, and what a model is left as when it was run on them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp8gemm.models.batches import Batch, batches, evaluating


def test_what_one_batch_is() -> None:
    x, y = torch.ones(2, 4), torch.zeros(2, 4)
    assert len(batches(x)) == len(batches((x, y))) == len(batches({"x": x, "y": y})) == 1
    assert len(batches([x, y])) == len(batches(iter([(x, y), {"x": x, "y": y}]))) == 2
    assert batches((x, y))[0].args == (x, y)
    assert batches([[x, y]])[0].args == (x, y)  # a DataLoader's batches are lists
    assert batches({"x": x})[0].kwargs == {"x": x}
    assert batches(Batch((x,)))[0].run(nn.Identity()) is x


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="calibration_inputs has no batches: give at least one"):
        batches([])
    with pytest.raises(ValueError, match="data must be a batch or an iterable of batches, found int"):
        batches(3, what="data")


def test_modes_and_random_numbers_are_restored() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model[0].eval()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)

    def interrupted() -> None:
        with evaluating(model):
            assert not model.training
            assert not model(torch.rand(2, 4)).requires_grad
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert model.training
    assert model[1].training
    assert not model[0].training
    assert torch.rand(1) == expected
