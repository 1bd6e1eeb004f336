"""Other threads see a weight as it was or as it is, while one casts, loads, writes to or forgets it; and forks."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp8gemm import FP8GemmOptions, disable_fp8_gemm, enable_fp8_gemm

SECONDS = 0.3  # each


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 64, 32))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.experts = nn.Linear(32, 48), Experts()
        with torch.no_grad():
            self.layer.bias.copy_(torch.arange(48) % 3)  # in every dtype the same


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
    """Doubled, which is exact in FP8, and back; in two parts, as an update of rows would be."""
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
    """Undone and patched again: the layer changes its class while it runs."""
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
    """Row by row, to within what FP8 rounds away: written values may be read before they are rounded."""
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
    # Dtypes change under whoever brings a tensor of his own, as they do in torch.
    names = [name for name in READERS if act is not cast or name.startswith("layer") or "experts" in name]
    names = [name for name in names if act is not patch or "e" in name and name != "values" and name != "all experts"]

    def results() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {name: READERS[name](model, x).float() for name in names}

    expected = []
    for turn in (0, 1):
        act(model, turn)
        expected += [results() for _ in range(3)]  # bound calls too
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
