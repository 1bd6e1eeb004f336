"""What FP8 would gain: attribution, Amdahl's law, bytes, and that the model is left as it is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as modules

from fp8gemm import (
    FP8GemmOptions,
    FP8Weight,
    Recipe,
    UnsupportedError,
    enable_fp8_gemm,
    estimate,
    paused,
    plan,
    report,
)
from fp8gemm.analysis import stand_ins
from fp8gemm.analysis.estimate import clock_of, measured, profiled
from fp8gemm.analysis.gain import Estimate, LayerEstimate
from fp8gemm.analysis.stand_ins import Rehearsal, Round
from fp8gemm.models.batches import Batch
from fp8gemm.weights.sharding import held

OPTIONS = FP8GemmOptions()


class Block(nn.Module):
    """Attention between a projection that would be converted and a head that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32, bias=False)
        self.head = nn.Linear(32, 16)
        self.unused = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        weights = torch.softmax(q @ k.transpose(-1, -2), dim=-1)
        y = self.out((weights @ v).transpose(1, 2).flatten(2))
        return self.head(F.gelu(self.out(y)))


class Experts(nn.Module):
    """All experts at once, with a stack as transformers names them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 32))
        self.down_proj = nn.Parameter(torch.randn(4, 32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = torch.bmm(x.expand(4, -1, -1), self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, self.down_proj.transpose(1, 2)).sum(0)


class Everything(nn.Module):
    """One of each kind of weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 32)
        self.other = nn.Embedding(24, 32)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.table.weight
        self.experts = Experts()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.overlapping = nn.Conv2d(3, 32, 3, padding=1)
        self.attention = nn.MultiheadAttention(32, 2)
        self.both = nn.Bilinear(32, 32, 16)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.other(ids % 24)
        x = x + self.patches(image).flatten(2).transpose(1, 2)[0] + self.overlapping(image).mean()
        y = x.unsqueeze(1)
        x = x + self.attention(y, y, y)[0].squeeze(1) + self.both(x, x).sum() + self.normed(x)
        return self.head(self.experts(x))


class Ticks:
    """A clock by which each operation takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def everything() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    return Everything(), (torch.arange(4), torch.randn(1, 3, 8, 8))


def test_amdahl_is_exact() -> None:
    rows = (
        LayerEstimate(name="a", status="fp8", shape=(8, 8), calls=1, seconds=8.0, seconds_fp8=2.0),
        LayerEstimate(name="b", status="fp8", shape=(8, 8), calls=1, seconds=1.0, seconds_fp8=4.0),
        LayerEstimate(name="c", status="fp8", shape=(8, 8)),
        LayerEstimate(name="d", status="kept", shape=(8, 8), reason="because", seconds=2.0),
    )
    found = Estimate(rows=rows, seconds=16.0, attention=4.0)
    assert found.seconds_after == 16 - 8 - 1 + 2 + 4
    assert found.speedup == 16 / 13
    assert found.shares == {"to convert": 9 / 16, "kept dense": 2 / 16, "attention": 4 / 16, "rest": 1 / 16}
    assert [row.name for row in found.slower] == ["b"]
    assert found.speedup_without_slower == 16 / (16 - 8 + 2)
    assert [row.speedup for row in rows] == [4.0, 0.25, None, None]
    text = str(found)
    assert "predicted: 16000.0 ms -> 13000.0 ms, 1.23 times as fast" in text
    assert "slower on FP8: 1 weights; 1.60 times as fast if module_filter keeps them dense: !b" in text
    assert "kept: d: because" in text


def test_what_is_not_converted_takes_no_negative_time() -> None:
    row = LayerEstimate(name="a", status="fp8", shape=(8, 8), seconds=8.0, seconds_fp8=2.0)
    found = Estimate(rows=(row,), seconds=4.0, attention=1.0)
    assert (found.seconds_after, found.speedup, found.shares["rest"]) == (2.0, 2.0, 0.0)


def test_operations_are_attributed() -> None:
    model, x = Block().eval(), torch.randn(2, 3, 32)
    steps = plan(model, module_filter="!head")
    with torch.no_grad():
        found = profiled(model, steps, OPTIONS, lambda: lambda: model(x), Ticks())
    assert [(step.name, one.geometry.kind, one.x, one.tokens) for step, one in found.calls] == [
        ("qkv", "layer", (2, 3, 32), 6),
        ("out", "layer", (2, 3, 32), 6),
        ("out", "layer", (2, 3, 32), 6),
    ]
    assert [one.geometry.bias for _, one in found.calls] == [True, False, False]
    assert found.attention == 3  # two products and the softmax between them
    assert found.kept == {"head.weight": 1}


def test_torchs_attention_is_attention() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q(x)
            return F.scaled_dot_product_attention(q, q, q).exp()

    model, x = Attention(), torch.randn(1, 2, 8, 16)
    with torch.no_grad():
        found = profiled(model, plan(model), OPTIONS, lambda: lambda: model(x), Ticks())
    assert found.attention >= 1
    assert len(found.calls) == 1


def test_every_kind_of_product_is_found() -> None:
    model, inputs = everything()
    model.eval()
    with torch.no_grad():
        found = profiled(model, plan(model), OPTIONS, lambda: lambda: model(*inputs), Ticks())
    kinds = {step.name: (one.geometry.kind, one.geometry.layout.shape, one.tokens) for step, one in found.calls}
    assert kinds == {
        "head": ("layer", (48, 32), 4),
        "experts.gate_up_proj": ("batched", (4, 64, 32), 16),
        "experts.down_proj": ("batched", (4, 32, 32), 16),
        "patches": ("convolution", (32, 48), 4),
        "attention.in_proj_weight": ("linear", (96, 32), 4),
        "attention.out_proj": ("linear", (32, 32), 4),
        "both": ("linear", (512, 32), 4),
    }
    assert set(found.kept) == {"overlapping.weight", "normed.parametrizations.weight.original1"}


def test_the_prediction_follows_from_the_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward of 16 s whose three calls of converted layers take 2 s each, and a quarter of that on FP8."""

    def rounds(self: Rehearsal, *args: Any, **kwargs: Any) -> Iterator[Round]:
        dense = dict.fromkeys(self.calls, 2.0)
        yield Round(forward=16.0, dense=dense, fp8=dict.fromkeys(self.calls, 0.5))

    monkeypatch.setattr(Rehearsal, "rounds", rounds)
    model, x = Block(), torch.randn(2, 3, 32)
    found = measured(model, plan(model, module_filter="!head"), OPTIONS, Batch((x,)), Ticks())
    rows = {row.name: (row.calls, row.tokens, row.seconds, row.seconds_fp8) for row in found.rows}
    assert rows == {
        "qkv": (1, 6, 2.0, 0.5),
        "out": (2, 12, 4.0, 1.0),
        "head": (0, 0, 1.0, None),
        "unused": (0, 0, 0.0, 0.0),
    }
    assert (found.seconds, found.attention, found.speedup) == (16.0, 3.0, 16 / (16 - 6 + 1.5))
    assert {row.engine for row in found.converted if row.calls} == {report(enable_fp8_gemm(model)).rows[0].engine}


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        FP8GemmOptions(scheme="block"),
        FP8GemmOptions(scheme="tensor", embeddings=True),
        FP8GemmOptions(fp16_weight_storage="keep"),
        Recipe(layers={"head": "original", "both": "block"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_report(options: Any, dtype: torch.dtype) -> None:
    model = Everything().to(dtype)
    whole = sum(one.nbytes for one in [*model.parameters(), *model.buffers()])
    found = estimate(model, options=options)
    then = report(enable_fp8_gemm(model, options=options))
    assert [(row.name, row.status, row.shape, row.reason, row.ties) for row in found.rows if row.status == "fp8"] == [
        (row.name, row.status, row.shape, row.reason, row.ties) for row in then.rows if row.status == "fp8"
    ]
    sizes = {row.name: (row.status, row.scheme, row.bytes_before, row.bytes_after, row.reason) for row in found.rows}
    assert sizes == {
        row.name: (row.status, row.scheme, row.bytes_before, row.bytes_after, row.reason) for row in then.rows
    }
    assert (found.bytes_before, found.bytes_after) == (then.bytes_before, then.bytes_after)
    assert found.model_bytes_before == whole
    assert found.model_bytes_after == sum(one.nbytes for one in [*model.parameters(), *model.buffers()])


def test_bytes_on_meta() -> None:
    with torch.device("meta"):
        model = Everything()
    found = estimate(model, torch.arange(4))
    assert (found.seconds, found.speedup, found.shares) == (None, None, {})
    assert str(found).startswith("speed: not timed: the model is on meta\nweights: 7 to convert, 2 kept dense")
    real = estimate(Everything())
    assert (found.bytes_before, found.bytes_after) == (real.bytes_before, real.bytes_after)
    assert "not timed: there are no inputs to run the model on" in str(real)
    then = report(enable_fp8_gemm(model))
    assert (found.bytes_before, found.bytes_after) == (then.bytes_before, then.bytes_after)


def state_of(model: nn.Module) -> list[Any]:
    values = [(name, id(one), one._version, one.tolist()) for name, one in model.state_dict(keep_vars=True).items()]
    owners = [
        (
            id(one),
            type(one),
            {key: dict(value) if isinstance(value, dict) else value for key, value in vars(one).items()},
        )
        for one in model.modules()
    ]
    hooks = [dict(modules._global_forward_pre_hooks), dict(modules._global_forward_hooks)]
    return [values, owners, hooks, torch.get_rng_state().tolist(), torch.is_grad_enabled()]


def test_the_model_is_left_as_it_is() -> None:
    model, inputs = everything()
    model.train()
    model.patches.eval()
    before = state_of(model)
    found = estimate(model, *inputs)
    assert found.speedup is not None
    assert sum(row.calls for row in found.rows) == 7
    assert state_of(model) == before


def test_an_interrupted_estimate_leaves_the_model_as_it_is() -> None:
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.runs = nn.Linear(32, 32), [0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs[0] += 1
            if self.runs[0] > 2:  # while it is recorded
                raise KeyboardInterrupt
            return self.layer(x)

    model, x = Stops(), torch.randn(2, 32)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        estimate(model, x)
    assert state_of(model) == before


def test_arguments_that_a_model_fills_are_copied() -> None:
    class Cache:
        def __init__(self) -> None:
            self.tokens: list[int] = []

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
            cache.tokens.append(len(x))
            assert len(cache.tokens) == 1
            return self.layer(x)

    cache = Cache()
    assert estimate(Decoder(), torch.randn(2, 32), cache=cache).rows[0].tokens == 2
    assert cache.tokens == []


def test_stand_ins_do_not_dequantize(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = everything()
    made: list[Any] = []
    former = stand_ins.made
    monkeypatch.setattr(stand_ins, "made", lambda *args, **kwargs: made.append(former(*args, **kwargs)) or made[-1])
    estimate(model, *inputs)
    assert len(made) == 6
    assert [held(one)._home.activity.dequantizations for one in made] == [0] * 6
    assert all(held(one)._home.activity.calls > 10 for one in made)


def test_nothing_to_convert() -> None:
    with pytest.raises(ValueError, match="nothing to convert: Sequential has no other layer with a matrix"):
        estimate(nn.Sequential(nn.LayerNorm(8)), torch.ones(1, 8))
    with pytest.raises(ValueError, match="pattern 'b' matches no layer"):
        estimate(nn.Sequential(nn.Linear(8, 8)), module_filter="b")
    with pytest.warns(UserWarning, match="nothing to convert"):
        found = estimate(nn.LayerNorm(8), torch.ones(1, 8), options=FP8GemmOptions(strict=False))
    assert found.speedup == 1


def test_a_patched_model_is_refused_and_a_paused_one_is_not() -> None:
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16)), module_filter="0")
    message = "1 weights of Sequential are on FP8 already, 0.weight the first: .*disable_fp8_gemm.*paused"
    with pytest.raises(ValueError, match=message):
        estimate(model, torch.randn(2, 32))
    with paused(model):
        found = estimate(model, torch.randn(2, 32))
    assert [(row.name, row.calls) for row in found.converted] == [("0", 1), ("1", 1)]
    assert isinstance(model[0].weight, FP8Weight)


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"Linear cannot run on these inputs.*RuntimeError: mat1 and mat2") as caught:
        estimate(nn.Linear(32, 32), torch.randn(2, 16))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ValueError, match="unexpected keyword argument 'hidden'"):
        estimate(nn.Linear(32, 32), hidden=torch.randn(2, 32))
    with pytest.raises(TypeError, match=r"estimate takes an nn\.Module, found dict"):
        estimate({}, torch.ones(1))  # type: ignore[arg-type]


def test_an_engine_that_cannot_run_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="the model itself: engine 'deep_gemm'"):
        estimate(nn.Linear(64, 64), torch.ones(1, 64), options=FP8GemmOptions(engine="deep_gemm"))


def test_as_plain_types_and_as_a_page(tmp_path: Path) -> None:
    found = estimate(nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)), nn.Linear(32, 1)), torch.ones(2, 32))
    data = json.loads(json.dumps(found.to_dict()))
    assert data["speedup"] == found.speedup
    assert [row["shape"] for row in data["rows"]] == [[32, 32]] * 3 + [[1, 32]]
    found.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("32 x 32") == 3
    assert "to convert" in page
    lines = str(found).splitlines()
    assert [line.split("  ")[0] for line in lines if "32 x 32" in line] == ["* (3)"]


def test_one_thread_is_timed_by_what_it_computes() -> None:
    threads = torch.get_num_threads()
    cpu = [torch.device("cpu")]
    try:
        torch.set_num_threads(1)
        fine = time.get_clock_info("thread_time").resolution < 1e-6
        assert clock_of(cpu) is (time.thread_time if fine else time.perf_counter)
        torch.set_num_threads(2)
        assert clock_of(cpu) is time.perf_counter
    finally:
        torch.set_num_threads(threads)


def test_products_under_autocast_are_found() -> None:
    """Also where autocast has kept the casts of an earlier call."""
    model, x = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)), torch.randn(2, 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        with torch.no_grad():
            found = profiled(model, plan(model), OPTIONS, lambda: lambda: model(x), Ticks())
    assert [(one.geometry.dtype, one.x_dtype, one.geometry.trains) for _, one in found.calls] == [
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
    ]
