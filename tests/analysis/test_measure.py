"""Measuring the output error of each layer: the figures are right, every layer has its row, and nothing changes."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import signal
import sys
import threading
import weakref
from dataclasses import replace
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode

from fp8gemm import (
    ROW,
    SCHEMES,
    FP8GemmOptions,
    FP8Weight,
    LayerError,
    Measurement,
    dequantize,
    disable_fp8_gemm,
    enable_fp8_gemm,
    measure,
    quantize,
    report,
)
from fp8gemm.analysis.layers import StandingIn
from fp8gemm.weights import Home

EXACT = FP8GemmOptions(engine="reference")


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(k, n) for k, n in pairwise(sizes))).eval()


def rows(found: Measurement) -> dict[str, LayerError]:
    return {layer.name: layer for layer in found.layers}


def decibels(y: torch.Tensor, y8: torch.Tensor) -> torch.Tensor:
    return 10 * (y.square().sum(-1) / (y - y8).square().sum(-1)).log10()


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_errors_are_those_of_the_dequantized_operands(scheme: str) -> None:
    """In float64 the reference engine multiplies exactly these, so only the summation order differs."""
    model, batches = mlp(192, 160, 96).double(), [torch.randn(7, 192).double(), torch.randn(2, 3, 192).double()]
    options = FP8GemmOptions(engine="reference", scheme=scheme)
    found = rows(measure(model, batches, options=options))
    weight, activation = SCHEMES[scheme].weight, SCHEMES[scheme].activation
    inputs = batches
    for name, layer in model.named_children():
        w = dequantize(quantize(layer.weight, weight), torch.float64)
        pairs = []
        for x in inputs:
            flat = x.flatten(0, -2)
            x8 = flat if activation is None else dequantize(quantize(flat, activation), torch.float64)
            pairs.append((layer(flat), F.linear(x8, w, layer.bias)))
        y, y8 = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        row, by_token = found[name], decibels(y, y8).sort().values
        assert row.sqnr == pytest.approx(decibels(y.flatten(), y8.flatten()).item(), rel=1e-9)
        expected = [by_token[6], by_token[0], by_token[0]]  # of 13 tokens
        assert [row.p50, row.p1, row.worst] == pytest.approx([value.item() for value in expected], rel=1e-6)
        assert (row.tokens, row.calls, row.shape) == (13, 2, tuple(layer.weight.shape))
        inputs = [layer(x) for x in inputs]


def test_percentiles_are_tokens() -> None:
    """Token t of 200 is 2**(t - 100) times a row whose error is the same for all but the last, which is exact."""
    layer = nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(16))
    x = torch.full((200, 16), 1.0)
    x[:, 1] = 1.03  # between two e4m3 values under the scale of 448 / 448
    x[:, 0] = 448 / 256
    x[3, 2:] = 0.0  # less signal, so a smaller SQNR
    x[7] = 0.0
    found = measure(layer, x, options=EXACT).layers[0]
    x8 = dequantize(quantize(x, ROW))
    by_token = decibels(x.double(), x8.double()).nan_to_num(nan=math.inf).sort().values
    assert found.worst == pytest.approx(by_token[0].item(), rel=1e-6)
    assert found.p1 == pytest.approx(by_token[1].item(), rel=1e-6)
    assert found.p50 == pytest.approx(by_token[99].item(), rel=1e-6)
    assert found.worst < found.p1
    assert by_token[-1] == math.inf


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_error_where_everything_is_representable(scheme: str) -> None:
    model = mlp(128, 128)
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(-8, 9, (128, 128)))
        model[0].weight[:, 0] = 448.0
        model[0].bias.zero_()
    x = torch.randint(-8, 9, (5, 128)).float()
    x[:, 0] = 448.0
    found = measure(model, x, options=FP8GemmOptions(engine="reference", scheme=scheme))
    row = found.layers[0]
    assert [row.sqnr, row.p50, row.p1, row.worst, found.output.sqnr] == [math.inf] * 5
    assert "exact" in str(found)
    assert json.loads(found.to_json())["layers"][0]["sqnr"] == "inf"


def test_a_planted_layer_is_the_worst() -> None:
    """An input channel 2**17 times larger than the others, which its weights do not pass on, costs them all precision;
    one 1000 times larger is found, too, but e4m3 has the exponents for it."""
    model = mlp(64, 64, 64, 64)
    with torch.no_grad():
        model[1].weight[5], model[1].bias[5] = 0.0, 2.0**17
        model[2].weight[:, 5] = 0.0
        model[0].weight[9], model[0].bias[9] = 0.0, 1000.0
        model[1].weight[:, 9] = 0.0
    found = measure(model, torch.randn(32, 64), options=EXACT)
    assert [layer.name for layer in found.worst(1)] == ["2"]
    assert found.worst(1)[0].sqnr < 20 < found.worst(2)[1].sqnr
    assert rows(found)["2"].outlier_channels == (5,)
    assert rows(found)["1"].outlier_channels == (9,)
    assert rows(found)["0"].outlier_channels == ()


def test_outlier_tokens() -> None:
    x = torch.randn(40, 64)
    x[[3, 8]] *= 100
    row = measure(mlp(64, 32), x).layers[0]
    assert (row.outlier_tokens, row.outlier_channels) == (2, ())


class Tied(nn.Module):
    """A tied head, a layer that runs twice, one that never runs, attention, experts, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.twice = nn.Linear(32, 32)
        self.again = self.twice
        self.never = nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.experts = nn.Parameter(torch.randn(2, 32, 32) / 6)
        self.mix = nn.Conv1d(32, 48, 1)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.again(self.twice(self.embedding(ids))) + self.head.weight.mean()
        x = x + self.attention(x, x, x)[0]
        x = torch.bmm(x.flatten(0, 1).expand(2, -1, -1), self.experts.transpose(1, 2)).mean(0).view_as(x)
        return self.head(self.mix(x.transpose(1, 2)).transpose(1, 2)[..., :32])


IDS = torch.arange(14).view(2, 7)


def everything(name: str, module: nn.Module) -> bool:
    return True


@pytest.mark.parametrize("storage", ["dense", "keep", "cpu_offload"])
def test_every_layer_has_its_row(storage: str) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    expected = rows(measure(model, IDS, module_filter=everything))
    if storage != "dense":
        enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage=storage), module_filter=everything)
        found = rows(measure(model, [IDS]))
        assert found.keys() == expected.keys()
        for name, row in found.items():  # kernels may add in another order, by the alignment of what they are given
            figures = {key: getattr(row, key) for key in ("sqnr", "p50", "p1", "worst")}
            assert replace(expected[name], **figures) == row
            others = [getattr(expected[name], key) for key in figures]
            assert list(figures.values()) == pytest.approx(others, rel=1e-3, nan_ok=True)
    names = ["head", "twice", "never", "attention.in_proj_weight", "attention.out_proj", "experts", "mix"]
    assert sorted(expected) == sorted(names)
    tokens = {name: (row.calls, row.tokens) for name, row in expected.items()}
    once = dict.fromkeys([*names[3:], "head"], (1, 14))
    assert tokens == {**once, "twice": (2, 28), "never": (0, 0)}
    assert expected["never"].reason == "these inputs do not reach it"
    assert math.isnan(expected["never"].sqnr)
    assert expected["never"].to_dict()["sqnr"] is None
    assert expected["head"].ties == ("embedding",)
    assert [row.name for row in expected.values() if row.measured and not 25 < row.sqnr < 45] == []
    assert all(row.outlier_channels == () for row in expected.values() if row.measured)


def state(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = [list(getattr(module, key)) for key in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks")]
        found[name] = (type(module), sorted(vars(module)), hooks, module.training)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        bits = parameter.scaled().data.view(torch.uint8) if isinstance(parameter, FP8Weight) else parameter
        values = bits.detach().clone().view(torch.uint8).tolist()
        found[f"parameter {name}"] = (
            id(parameter),
            type(parameter),
            parameter._version,
            sorted(vars(parameter)),
            values,
        )
    found["activity"] = [(row.calls, row.kernels, row.dequantizations) for row in report(model).rows]
    found["random"] = torch.get_rng_state().tolist()
    found["fast path"] = torch.backends.mha.get_fastpath_enabled()
    found["modes"] = torch._C._len_torch_dispatch_stack()
    return found


class Fails:
    """Raises at the n-th product with an FP8 weight."""

    def __init__(self, error: BaseException, after: int) -> None:
        self.error, self.after = error, after

    def __call__(self, *arguments: Any) -> None:
        self.after -= 1
        if self.after < 0:
            raise self.error


@pytest.mark.parametrize("error", [None, RuntimeError("no"), KeyboardInterrupt()], ids=str)
@pytest.mark.parametrize("storage", ["dense", "keep"])
def test_the_model_is_as_before(storage: str, error: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Tied(), nn.Dropout(0.5)).train()
    model[0].embedding.weight.requires_grad_(False)
    if storage == "keep":
        enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage="keep"), module_filter=everything)
    before = state(model)
    if error is None:
        measure(model, [IDS, IDS[:1]], module_filter=everything)
    else:
        for after in range(0, 8, 3):
            monkeypatch.setattr("fp8gemm.analysis.probes._note_inputs", Fails(error, after))
            with pytest.raises(type(error)):
                measure(model, [IDS, IDS[:1]], module_filter=everything)
            assert state(model) == before
    assert state(model) == before


def test_an_interrupt_of_the_restoration_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandingIn, "__exit__", lambda *arguments: None)
    model = Tied()
    before = state(model)
    monkeypatch.setattr("fp8gemm.analysis.probes._note_inputs", Fails(KeyboardInterrupt(), 2))
    with pytest.raises(KeyboardInterrupt):
        measure(model, IDS, module_filter=everything)
    assert state(model) == before


class Sees(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_an_interrupt_within_torchs_own_stack_of_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*arguments: Any) -> None:
        while torch._C._len_torch_dispatch_stack():
            _pop_mode()
        raise KeyboardInterrupt

    monkeypatch.setattr("fp8gemm.analysis.measure.roles", lose)
    model = Tied()
    with Sees() as outer:
        with pytest.raises(KeyboardInterrupt):
            measure(model, IDS, module_filter=everything)
        assert _get_current_dispatch_mode_stack() == [outer]


def test_one_layer_at_a_time_has_fp8_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each FP8 weight is gone before the next is made, without the help of the garbage collector."""
    alive: weakref.WeakSet[Home] = weakref.WeakSet()
    most, made = [], Home.__init__

    def counted(self: Home, *arguments: Any, **more: Any) -> None:
        assert torch._C._len_torch_dispatch_stack() == 0  # under a mode, the compiled quantizer does not run
        made(self, *arguments, **more)
        alive.add(self)
        most.append(len(alive))

    monkeypatch.setattr(Home, "__init__", counted)
    model = mlp(64, 96, 64, 32, 64)
    gc.collect()
    gc.disable()
    try:
        measure(model, [torch.randn(5, 64), torch.randn(3, 64)])
    finally:
        gc.enable()
    assert len(most) == 4 * 2 * 2
    assert max(most) == 1
    assert not alive


def test_of_a_whole_model() -> None:
    model, x = mlp(64, 96, 64), torch.randn(9, 64)
    with torch.no_grad():
        y, y8 = (
            model(x).double(),
            enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage="keep"))(x).double(),
        )
    patched = measure(model, x)
    assert patched.output.sqnr == pytest.approx(decibels(y.flatten(), y8.flatten()).item(), rel=1e-6)
    assert measure(disable_fp8_gemm(model)[0], x).output == patched.output


@pytest.mark.parametrize("storage", ["dense", "keep"])
def test_interrupts_at_any_time(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT from another thread, again and again: the model is as before, whenever it comes."""
    model = nn.Sequential(Tied(), nn.Dropout(0.5)).train()
    if storage == "keep":
        enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage="keep"), module_filter=everything)
    before, chance, caught = state(model), random.Random(0), []

    def interrupt(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is measure.__code__:
                raise KeyboardInterrupt
            frame = frame.f_back

    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # what a finalizer raises reaches nobody
    handler = signal.signal(signal.SIGINT, interrupt)
    try:
        for _ in range(15):
            timer = threading.Timer(chance.random() * 0.06, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            try:
                measure(model, [IDS, IDS[:1]], module_filter=everything)
            except KeyboardInterrupt:
                caught.append(1)
            finally:
                timer.join()
            assert state(model) == before
            assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGINT, handler)
    assert caught
