"""Other threads see a weight before or after a cast, load, write or ``forget``, never in between; and forks."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp8gemm import FP8GemmOptions, disable_fp8_gemm, enable_fp8_gemm
from fp8gemm.weights import home
from fp8gemm.weights.packed import quantized

SECONDS = 0.3  # per test


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 64, 32))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.experts = nn.Linear(32, 48), Experts()
        with torch.no_grad():
            self.layer.bias.copy_(torch.arange(48) % 3)  # exact in every dtype


def cast(model: Model, turn: int) -> None:
    model.layer.to(torch.bfloat16 if turn == 0 else torch.float32)


def load(model: Model, turn: int) -> None:
    model.load_state_dict(model.states[turn])


def assign(model: Model, turn: int) -> None:
    model.load_state_dict(model.states[turn], assign=True)


def load_dense(model: Model, turn: int) -> None:
    model.load_state_dict(model.dense[turn])


@torch.no_grad()
def write(model: Model, turn: int) -> None:
    """Doubles the weight, which is exact in FP8, and restores it, in two parts like an update of rows."""
    for parameter in (model.layer.weight, model.experts.gate_up_proj):
        parameter.mul_(2 if turn == 0 else 0.5)


@torch.no_grad()
def exchange(model: Model, turn: int) -> None:
    model.layer.weight.data = model.dense[turn]["layer.weight"].clone()
    model.experts.gate_up_proj.data = model.dense[turn]["experts.gate_up_proj"].clone()


def forget(model: Model, turn: int) -> None:
    model.layer.invalidate_weight_cache()
    model.experts.gate_up_proj._home.forget()


def copy_and_save(model: Model, turn: int) -> None:
    copy.deepcopy(model.layer)
    model.state_dict()


def patch(model: Model, turn: int) -> None:
    """Undoes the patch and patches again: the layer changes its class while it runs."""
    if turn == 0:
        disable_fp8_gemm(model)
    else:
        enable_fp8_gemm(model, options=model.options)


READERS: dict[str, Callable[[Model, torch.Tensor], torch.Tensor]] = {
    "layer": lambda model, x: model.layer(x),
    "layer, of another length": lambda model, x: model.layer(x[: 1 + time.monotonic_ns() % 64])[:1],
    "linear": lambda model, x: F.linear(x, model.layer.weight, model.layer.bias),
    "matmul": lambda model, x: x @ model.layer.weight.t(),
    "experts": lambda model, x: F.linear(x, model.experts.gate_up_proj[1]),
    "all experts": lambda model, x: torch.bmm(x.expand(2, -1, -1), model.experts.gate_up_proj.transpose(1, 2)),
    "values": lambda model, x: model.layer.weight.dequantize(),
}


def alike(y: torch.Tensor, expected: torch.Tensor) -> bool:
    """Writes row by row; compared up to FP8's rounding, as pending writes may be read before they are quantized."""
    return bool(((y - expected).norm(dim=-1) <= 0.06 * expected.norm(dim=-1)).all())


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("storage", ["keep", "discard"])
@pytest.mark.parametrize(
    "act", [cast, load, assign, load_dense, write, exchange, forget, copy_and_save, patch], ids=lambda act: act.__name__
)
def test_threads_see_the_old_weight_or_the_new(act: Callable[[Model, int], None], storage: str) -> None:
    options = FP8GemmOptions(fp16_weight_storage=storage)  # type: ignore[arg-type]
    model = Model()
    model.dense = [copy.deepcopy(model.state_dict()), copy.deepcopy(model.state_dict())]
    for name in ("layer.weight", "experts.gate_up_proj"):
        model.dense[1][name].mul_(-3)
    model.options = options
    enable_fp8_gemm(model, options=options)
    model.states = [copy.deepcopy(model.state_dict())]
    model.load_state_dict(model.dense[1])
    model.states.append(copy.deepcopy(model.state_dict()))
    x = torch.randn(64, 32)
    # A caller with a tensor of its own sees the dtype change, as in torch.
    names = [name for name in READERS if act is not cast or name.startswith("layer") or "experts" in name]
    if act is patch:  # a dense weight gives no dequantized values, and bmm rounds differently
        names = [name for name in names if name not in ("values", "all experts")]

    def results() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {name: READERS[name](model, x).float() for name in names}

    expected = []
    for turn in (0, 1):
        act(model, turn)
        expected += [results() for _ in range(3)]  # including bound calls
    faults: list[str] = []
    over = False

    def read(name: str) -> None:
        count = 0
        while not over or not count:
            count += 1
            try:
                with torch.no_grad():
                    y = READERS[name](model, x).float()
            except Exception as error:
                faults.append(f"{name}: {type(error).__name__}: {error}")
                continue
            if not any(alike(y, one[name]) for one in expected):
                faults.append(f"{name}: neither the old result nor the new")

    readers = [threading.Thread(target=read, args=(name,)) for name in names]
    with hurried():
        for thread in readers:
            thread.start()
        end, turns = time.monotonic() + SECONDS, 0
        while time.monotonic() < end:
            act(model, turns % 2)
            turns += 1
        over = True
        for thread in readers:
            thread.join()
    assert turns > 2
    assert faults == []


@pytest.mark.parametrize("storage", ["keep", "discard"])
def test_a_weight_is_quantized_once_however_many_ask(storage: str, monkeypatch) -> None:
    options = FP8GemmOptions(fp16_weight_storage=storage, materialize_fp8_on_wrap=False)  # type: ignore[arg-type]
    calls = []
    monkeypatch.setattr(home, "quantized", lambda *given: calls.append(1) or time.sleep(0.01) or quantized(*given))
    layer, x, results = enable_fp8_gemm(nn.Linear(32, 48), options=options), torch.randn(3, 32), []
    threads = [threading.Thread(target=lambda: results.append(layer(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert all(torch.equal(y, layer(x)) for y in results)
    assert len(results) == 4


@pytest.mark.parametrize("by_bytes", [True, False])
def test_two_threads_may_write_to_two_parts(by_bytes: bool) -> None:
    """No write to the same weight from several threads is lost."""
    layer = enable_fp8_gemm(nn.Linear(32, 48))
    sources = [enable_fp8_gemm(nn.Linear(32, 48)).weight for _ in range(2)]
    faults: list[str] = []

    def work(part: slice) -> None:
        for turn in range(60):
            rows = sources[turn % 2].data[part] if by_bytes else sources[turn % 2].dequantize()[part]
            with torch.no_grad():
                layer.weight.data[part].copy_(rows)
            if not torch.equal(layer.weight.data[part].dequantize(), sources[turn % 2].dequantize()[part]):
                faults.append(f"{part}, turn {turn}")

    threads = [threading.Thread(target=work, args=(part,)) for part in (slice(0, 24), slice(24, 48))]
    with hurried():
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            layer(torch.ones(1, 32))
    assert faults == []


FORKED = """
import copy, os, signal, sys, threading, time, torch
from torch import nn
from fp8gemm import FP8GemmOptions, enable_fp8_gemm

torch.set_num_threads(1)
x, dense = torch.randn(3, 32), nn.Linear(32, 48, bias=False)
lazy = FP8GemmOptions(materialize_fp8_on_wrap=False)
shared = enable_fp8_gemm(copy.deepcopy(dense))
once, over = shared(x), False

@torch.library.custom_op("forked::scale", mutates_args=("w",))
def scale(w: torch.Tensor, factor: float) -> None:
    w[:20].mul_(factor)
    time.sleep(0.02)
    w[20:].mul_(factor)

with torch.no_grad():
    scale(shared.weight, 1)  # what torch imports now it would import under a lock of its own

def quantize():
    while not over:
        enable_fp8_gemm(copy.deepcopy(dense), options=lazy)(x)

@torch.no_grad()
def write():
    while not over:
        for factor in (2, 0.5):
            scale(shared.weight, factor)
            time.sleep(0.01)

def child():
    signal.alarm(20)
    y = shared(x)  # whatever the other threads were doing
    assert torch.equal(y, once) or torch.equal(y, 2 * once)
    with torch.no_grad():
        shared.weight.copy_(torch.eye(48, 32))
    assert torch.equal(shared(torch.ones(1, 32)), torch.eye(48, 32).sum(1)[None])
    assert torch.equal(enable_fp8_gemm(copy.deepcopy(dense), options=lazy)(x), once)
    os._exit(0)

threads = [threading.Thread(target=work) for work in (quantize, write)]
for thread in threads: thread.start()
try:
    for turn in range(12):
        time.sleep(turn / 997)
        pid = os.fork()
        if pid == 0:
            try:
                child()
            finally:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
    print("forked")
finally:
    over = True
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_while_others_quantize() -> None:
    """The child waits for no lock that another thread held, and finds each weight between two changes."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "forked\n"
