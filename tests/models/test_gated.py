"""Gated MLPs are recognized by what they compute; fusing activation and quantization does not change the result."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp8gemm import FP8GemmOptions, FP8Linear, disable_fp8_gemm, enable_fp8_gemm, fuse_gated, fuse_siblings
from fp8gemm.engines import ENGINES
from fp8gemm.engines.reference import ReferenceEngine
from fp8gemm.models import warmup as warmup_module
from fp8gemm.models.warmup import warmup
from fp8gemm.weights import linear

WRONG = 7.0  # added by a kernel that must not run


class Gating(ReferenceEngine):
    """The reference engine with a fused step from 5 tokens on, which it counts."""

    def __init__(self) -> None:
        self.fused = 0

    def gated(self, gate, up, weight, bias, out_dtype):
        if gate.shape[0] < 5:
            return None
        assert gate.stride(1) == up.stride(1) == 1
        self.fused += 1
        product = F.silu(gate.float()) * up.float()
        return super().linear(product, weight, bias, torch.float32).to(out_dtype)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Gating:
    gating = Gating()
    monkeypatch.setattr(linear, "ENGINES", {**ENGINES, "reference": gating})
    return gating


class Mlp(nn.Module):
    """As written in transformers."""

    def __init__(self, act: nn.Module | None = None, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(32, 48, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(48, 32, bias=bias)
        self.act_fn = act or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class OtherNames(nn.Module):
    """As written in Llama's own code, with the factors reversed."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 48)

    def forward(self, x):
        return self.w2(torch.mul(self.w3(x), F.silu(self.w1(x))))


class Scaled(Mlp):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2


class Crossed(Mlp):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x + 1))


class Summed(Mlp):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Branching(Mlp):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class Writing(Mlp):
    """A step whose result is not used, but which modifies what the others see."""

    def forward(self, x):
        x.mul_(2)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Dropped(Mlp):
    def forward(self, x):
        return self.down_proj(F.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x), training=self.training))


def patched(model: nn.Module) -> nn.Module:
    enable_fp8_gemm(model.requires_grad_(False), options=FP8GemmOptions(engine="reference"))
    return model


@pytest.mark.parametrize("make", [Mlp, OtherNames, lambda: Mlp(bias=True)])
@torch.no_grad()
def test_the_same_with_one_step_less(make, engine: Gating) -> None:
    plain = patched(nn.Sequential(make(), nn.LayerNorm(32)))
    model = copy.deepcopy(plain)
    found = fuse_gated(model)
    assert len(found.groups) == 1
    assert found.refused == {}
    assert type(model[0]).__name__ == type(plain[0]).__name__
    for shape, fused in (((2, 32), 0), ((4, 3, 32), 1), ((6, 32), 1)):
        x, engine.fused = torch.randn(shape), 0
        torch.testing.assert_close(model(x), plain(x), rtol=2e-2, atol=2e-2)
        assert engine.fused == fused
    assert fuse_gated(model).groups == ()


def test_names_and_order_do_not_matter() -> None:
    model = patched(nn.ModuleDict({"a": Mlp(), "b": OtherNames()}))
    assert fuse_gated(model).groups == (
        ("a.gate_proj", "a.up_proj", "a.down_proj"),
        ("b.w1", "b.w3", "b.w2"),
    )


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Mlp(nn.GELU()), "its activation function is not silu"),
        (Scaled, "its forward has 8 steps and is not down"),
        (Crossed, "its forward has 8 steps and is not down"),
        (Writing, "its forward has 8 steps and is not down"),
        (Dropped, "its forward has 8 steps and is not down"),
        (Summed, "the input of its last layer is not a product"),
        (Branching, "its forward cannot be traced: TraceError"),
    ],
)
def test_what_is_another_formula_stays(make, reason: str, engine: Gating) -> None:
    plain = patched(make())
    model = copy.deepcopy(plain)
    found = fuse_gated(model)
    assert found.groups == ()
    (given,) = found.refused.values()
    assert given.startswith(reason)
    assert type(model) is type(plain)


@torch.no_grad()
def test_hooks_are_called(engine: Gating) -> None:
    model = patched(Mlp())
    fuse_gated(model)
    seen = []
    x = torch.randn(8, 32)
    for child in (model.down_proj, model.act_fn):
        handle = child.register_forward_hook(lambda module, args, y: seen.append(module))
        model(x)
        assert seen.pop() is child
        assert engine.fused == 0
        handle.remove()
    model.gate_proj.register_forward_hook(lambda module, args, y: y * 0)
    assert model(x).eq(0).all()
    assert engine.fused == 1
    model.down_proj.forward = lambda x: x + WRONG  # as accelerate wraps it
    assert model(x).eq(WRONG).all()


def test_gradients_and_autocast_take_the_models_own_code(engine: Gating) -> None:
    model = patched(Mlp())
    fuse_gated(model)
    x = torch.randn(8, 32, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x.detach()).dtype == torch.bfloat16
    assert engine.fused == 0


@torch.no_grad()
def test_joined_gate_and_up(engine: Gating) -> None:
    """The halves of one product, whose rows are not adjacent."""
    plain = patched(nn.Sequential(Mlp()))
    model = copy.deepcopy(plain)
    fuse_siblings(model)
    assert len(fuse_gated(model).groups) == 1
    x = torch.randn(8, 32)
    for _ in range(3):
        torch.testing.assert_close(model(x.clone()), plain(x), rtol=2e-2, atol=2e-2)
    assert engine.fused == 2  # the first pass is observed, and runs unfused


@torch.no_grad()
def test_copies_pickles_and_the_way_back(engine: Gating) -> None:
    model = patched(Mlp())
    fuse_gated(model)
    x = torch.randn(8, 32)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        engine.fused = 0
        assert twin(x).equal(expected)
        assert engine.fused == 1
    disable_fp8_gemm(model)
    assert type(model) is Mlp
    assert type(model.down_proj) is nn.Linear
    model(x)


@torch.no_grad()
def test_a_real_model(engine: Gating) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = patched(transformers.LlamaForCausalLM(config).eval())
    ids = torch.randint(64, (1, 9))
    expected = model(ids).logits
    found = fuse_gated(model)
    assert len(found.groups) == 2
    y = model(ids).logits
    assert engine.fused == 2
    assert (y - expected).norm() <= 2e-2 * expected.norm()


def test_engines_that_do_not_round_run_the_models_own_code() -> None:
    model = enable_fp8_gemm(Mlp())
    x = torch.randn(8, 32)
    with torch.no_grad():
        expected = model(x)
        fuse_gated(model)
        assert model(x).equal(expected)
    assert isinstance(model.down_proj, FP8Linear)


def test_warmup_runs_the_fused_step(engine: Gating, monkeypatch: pytest.MonkeyPatch) -> None:
    model = enable_fp8_gemm(nn.Sequential(Mlp(), Mlp()), options=FP8GemmOptions(engine="reference"))
    monkeypatch.setattr(warmup_module, "ENGINES", {**ENGINES, "reference": engine})
    before = warmup(model, tokens=[1, 8])
    fuse_gated(model)
    assert engine.fused == 0
    assert warmup(model, tokens=[1, 8]) == before + 1, "one token is not fused"
    assert engine.fused == 1, "the MLPs are of one kind"
