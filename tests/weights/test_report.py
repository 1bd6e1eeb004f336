"""The report knows whether each converted layer ran on FP8 in the last forward pass, and what it did else."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from branches import READS, Branches, X, branches, last
from torch import nn

import fp8gemm
from fp8gemm import FP8GemmOptions, disable_fp8_gemm, enable_fp8_gemm, paused, report, strict
from fp8gemm.weights.activity import CLOCK, KEPT_KERNEL, Activity, Counts
from fp8gemm.weights.passes import Passes, passes_of

HINT = "layers that need not be called, such as experts without tokens: allow_uncalled=True or patterns"


def wrong(model: nn.Module, **more: Any) -> list[str]:
    """The lines of the error of ``check``."""
    with pytest.raises(ValueError, match="converted layers did not run on FP8") as caught:
        report(model).check(coverage=None, **more)
    return str(caught.value).splitlines()


@torch.no_grad()
def test_each_pass_is_counted_by_itself() -> None:
    model = branches()
    assert last(model) == {"body": None, "head": None}
    for _ in range(3):
        model(X)
        assert last(model) == {"body": Counts(fp8=1), "head": Counts(fp8=1)}
        report(model).check()
    assert [row.calls for row in report(model).rows] == [3, 3]


@torch.no_grad()
def test_a_layer_that_was_not_called_is_named() -> None:
    model = branches()
    model(X)
    model(X, head=False)
    assert last(model) == {"body": Counts(fp8=1), "head": Counts()}
    assert wrong(model) == [
        "1 of 2 converted layers did not run on FP8 in the last forward pass:",
        "  head: not called",
        HINT,
    ]
    for allowed in (True, "head", "h*", ["body", "he?d"]):
        report(model).check(allow_uncalled=allowed)
    assert wrong(model, allow_uncalled="body")[1] == "  head: not called"
    with pytest.raises(ValueError, match=r"allow_uncalled='tail' matches no converted layer; those are body, head"):
        report(model).check(allow_uncalled=["head", "tail"])
    model(X)
    report(model).check()


@torch.no_grad()
def test_what_happens_between_passes_belongs_to_none() -> None:
    model = branches()
    model(X)
    model.body(X)
    model.body.weight.dequantize()
    model.head.weight.norm()
    assert last(model) == {"body": Counts(fp8=1), "head": Counts(fp8=1)}
    model(X, head=False)
    model.head(X)
    assert last(model)["head"] == Counts()


def test_a_backward_pass_belongs_to_no_forward_pass() -> None:
    model = branches()
    model(X.clone().requires_grad_()).sum().backward()
    assert last(model) == {"body": Counts(fp8=1), "head": Counts(fp8=1)}
    report(model).check()
    with strict(model):
        for _ in range(2):
            model(X.clone().requires_grad_()).sum().backward()


@torch.no_grad()
def test_a_module_that_reads_values_is_named() -> None:
    model = branches()
    model(X)
    model.reads = True
    model(X)
    assert wrong(model) == [
        "1 of 2 converted layers did not run on FP8 in the last forward pass:",
        f"  body: dequantized once: {READS}",
    ]
    model.body.register_forward_hook(lambda module, args, y: y + 0 * module.weight.norm())
    model.reads = False
    model(X)
    assert last(model)["body"] == Counts(fp8=1, dequantizations=1)
    report(model).check()  # it ran on FP8


@torch.no_grad()
def test_a_weight_that_became_dense_is_named() -> None:
    model = branches()
    model(X)
    model.body._parameters["weight"] = nn.Parameter(model.body.weight.dequantize())
    model(X)
    (body, head) = report(model).rows
    assert (body.replaced, head.replaced) == (True, False)
    assert wrong(model) == [
        "1 of 2 converted layers did not run on FP8 in the last forward pass:",
        "  body: its weight was replaced by a dense one after patching; call enable_fp8_gemm again",
    ]
    enable_fp8_gemm(model)
    model(X)
    report(model).check()


@torch.no_grad()
def test_a_bare_parameter_that_became_dense_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights, self.offsets = nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.randn(32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weights + self.offsets[: len(x)]

    model = enable_fp8_gemm(nn.Sequential(Bare()), example_inputs=X)
    model(X)
    report(model).check()
    model[0].weights = nn.Parameter(model[0].weights.dequantize())
    model(X)
    assert wrong(model)[1].startswith("  0.weights: its weight was replaced by a dense one after patching")
    assert not disable_fp8_gemm(model)[1].rows
    assert report(model).rows == ()


@torch.no_grad()
def test_a_forward_that_goes_past_the_weight_is_named() -> None:
    model = branches()
    dense = model.head.weight.dequantize()
    model.head.forward = lambda x: F.linear(x, dense, model.head.bias)
    model(X)
    assert wrong(model)[1:] == ["  head: not called: its forward was replaced on the object", HINT]


@torch.no_grad()
def test_products_with_the_kept_original_are_not_on_fp8() -> None:
    model = branches()
    model(X)
    model.body.register_forward_hook(lambda module, args, y: module.weight.activity.count(KEPT_KERNEL))
    model(X)
    assert last(model)["body"] == Counts(fp8=1, kept=1)
    report(model).check()
    model.body.forward = lambda x: x
    model(X)
    assert wrong(model)[1] == "  body: multiplied once by the kept original, where FP8 is expected to be slower"


@torch.no_grad()
def test_many_wrong_layers_are_cut_short() -> None:
    model = enable_fp8_gemm(nn.ModuleList([nn.Linear(16, 16) for _ in range(30)]))
    model.forward = lambda x: x  # type: ignore[method-assign]
    model(X)
    lines = wrong(model)
    assert len(lines) == 1 + 20 + 2
    assert lines[-2:] == ["  and 10 more", HINT]
    model = enable_fp8_gemm(nn.ModuleList([nn.Linear(16, 16) for _ in range(7)]))
    with pytest.raises(ValueError, match=r"those are 0, 1, 2, 3, 4 and 2 more$"), strict(model, allow_uncalled="x"):
        pass


@torch.no_grad()
def test_nested_failed_and_paused_passes() -> None:
    model = branches()
    model.inner = True
    model(X)
    assert last(model) == {"body": Counts(fp8=2), "head": Counts(fp8=1)}
    found = []
    for _ in range(100):
        with pytest.raises(RuntimeError):
            model(X[:, :3])
        found.append(last(model)["body"])
    assert found == [Counts(fp8=2), Counts(fp8=2), Counts(fp8=1), *[None] * 97]  # never that it was not called
    assert wrong(model)[1].startswith("  body: what it did is no longer known")
    model(X, head=False)
    assert last(model) == {"body": Counts(fp8=1), "head": Counts()}
    noted = passes_of(model)
    assert noted is not None
    assert len(noted.begun.times) <= 64
    with paused(model):
        model(X)
        model(X)
    assert last(model) == {"body": Counts(fp8=1), "head": Counts()}


@torch.no_grad()
def test_measuring_does_not_count_as_use() -> None:
    model = enable_fp8_gemm(Branches().eval(), options=FP8GemmOptions(fp16_weight_storage="keep"))
    model(X, head=False)
    found = fp8gemm.measure(model, [X] * 5)
    assert last(model) == {"body": Counts(fp8=1), "head": Counts()}
    assert [layer.name for layer in found.layers] == ["body", "head"]


@torch.no_grad()
def test_layers_that_were_set_to_their_originals_are_as_asked_for() -> None:
    model = enable_fp8_gemm(Branches().eval(), options=FP8GemmOptions(fp16_weight_storage="keep"))
    fp8gemm.set_precision(model, "body", "original")
    fp8gemm.set_precision(model, "head", "weight_only")
    model(X)
    with strict(model):
        model(X)
    assert last(model) == {"body": Counts(kept=1), "head": Counts(fp8=1)}
    report(model).check(coverage=None)


@torch.no_grad()
def test_other_models_do_not_disturb() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.own = branches(), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                y = self.own(self.inner(x))
            return y  # type: ignore[no-any-return]

    outer, other = enable_fp8_gemm(Outer().eval()), branches()
    outer(X)
    for _ in range(9):
        other(X)
    assert last(outer)["own"] == Counts(fp8=3)
    assert last(outer.inner) == {"body": Counts(fp8=1), "head": Counts(fp8=1)}
    assert last(outer)["inner.body"] == Counts(fp8=3)
    report(outer).check()


@torch.no_grad()
def test_threads_have_passes_of_their_own() -> None:
    model, errors = branches(), []

    def run() -> None:
        try:
            for _ in range(20):
                model(X)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert errors == []
    model(X)
    assert last(model) == {"body": Counts(fp8=1), "head": Counts(fp8=1)}


@torch.no_grad()
def test_copies_remember_and_pickles_forget() -> None:
    model = branches()
    model(X)
    twin = copy.deepcopy(model)
    assert last(twin) == last(model)
    twin(X, head=False)
    assert last(twin)["head"] == Counts()
    assert last(model)["head"] == Counts(fp8=1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert last(loaded) == {"body": None, "head": None}
        assert [row.calls for row in report(loaded).rows] == [1, 1]
        loaded(X)
        assert last(loaded) == {"body": Counts(fp8=1), "head": Counts(fp8=1)}


def test_a_copy_of_an_activity_has_everything() -> None:
    activity = Activity(saturated=3, checked=5)
    activity.count("a")
    activity.dequantized()
    twin = copy.deepcopy(activity)
    assert vars(twin) == vars(activity)
    before = copy.deepcopy(vars(activity))
    CLOCK.tick()
    twin.count("a")
    assert vars(activity) == before


def test_an_activity_of_another_process_has_no_times() -> None:
    """This clock may stand where the other one stood when the weight was used last."""
    activity = Activity()
    activity.count("a")
    CLOCK.tick()
    assert activity.time >= 0
    loaded = pickle.loads(pickle.dumps(activity))
    assert vars(loaded) == {**vars(Activity()), "latest_mark": 1, "calls": 1, "kernels": {"a": 1}, "latest": "a"}
    older = Activity.__new__(Activity)
    older.__setstate__({"calls": 1, "kernels": Counter(a=1), "latest": "a", "dequantizations": 2})
    older.count("b")
    assert older.counts() == Counts(fp8=2, dequantizations=2)


def test_undoing_removes_the_hooks_and_loading_installs_them(tmp_path: Any) -> None:
    model = branches()
    hooks = (model._forward_hooks, model._forward_pre_hooks)
    with pytest.warns(UserWarning, match="nothing to convert"):
        enable_fp8_gemm(model, options=FP8GemmOptions(strict=False))
    assert [sum(isinstance(hook.__self__, Passes) for hook in table.values()) for table in hooks] == [1, 1]
    fp8gemm.save_checkpoint(model, tmp_path / "fp8")
    disable_fp8_gemm(model)
    assert [len(table) for table in hooks] == [0, 0]
    fp8gemm.load_checkpoint(model, tmp_path / "fp8", dequantize=True)
    assert passes_of(model) is None
    fp8gemm.load_checkpoint(model, tmp_path / "fp8")
    with pytest.raises(ValueError, match="no forward pass was seen yet"):
        report(model).check(coverage=None)
    with torch.no_grad():
        model(X, head=False)
    assert wrong(model)[1] == "  head: not called"
    with pytest.raises(ValueError, match=r"for loaded ones, whose multiply-adds are not counted, check\(coverage=None"):
        report(model).check()


@torch.no_grad()
def test_a_model_that_is_one_layer_counts_since_patching() -> None:
    model = enable_fp8_gemm(nn.Linear(32, 32))
    assert passes_of(model) is None
    assert report(model).rows[0].last is None
    model(X)
    model(X)
    assert report(model).rows[0].last == Counts(fp8=2)
    report(model).check()
