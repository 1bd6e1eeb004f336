"""Pausing a patched model: dense weights for a while, and the same FP8 parameters afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp8gemm import (
    FP8GemmOptions,
    FP8Weight,
    disable_fp8_gemm,
    enable_fp8_gemm,
    fuse_gated,
    fuse_siblings,
    paused,
    report,
)

STORAGES = ("discard", "keep", "cpu_offload")


class Model(nn.Module):
    """A gated MLP, attention, a stack of experts, a convolution that is a product, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 48)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(48, 64), nn.Linear(48, 64), nn.Linear(64, 48)
        self.attention = nn.MultiheadAttention(48, 4, batch_first=True)
        self.experts = nn.Parameter(torch.randn(3, 24, 48) / 7)
        self.mix = nn.Conv1d(48, 48, 1)
        self.head = nn.Linear(48, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        y = torch.bmm(x.expand(3, -1, -1), self.experts.transpose(1, 2)).mean(0).repeat(1, 2)[None]
        return self.head(self.mix((x + y).transpose(1, 2)).transpose(1, 2))


IDS = torch.arange(7)[None]


def made(storage: str, *, lazy: bool = False) -> tuple[nn.Module, nn.Module]:
    """A patched model, and the dense one that it is while it is paused."""
    torch.manual_seed(0)
    dense = Model().eval()
    options = FP8GemmOptions(fp16_weight_storage=storage, materialize_fp8_on_wrap=not lazy, embeddings=True)
    model = enable_fp8_gemm(copy.deepcopy(dense), options=options, module_filter=lambda name, module: True)
    if storage == "discard" and not lazy:
        dense = disable_fp8_gemm(copy.deepcopy(model))[0]
    return model, dense


def parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@torch.no_grad()
def test_paused_models_are_dense_and_then_as_before(storage: str, lazy: bool, fused: bool) -> None:
    model, dense = made(storage, lazy=lazy)
    if fused:
        fuse_siblings(model)
        fuse_gated(model)
    before, held = [], parameters(model)
    if not lazy:
        before = [model(IDS) for _ in range(3)]
    activity = [(row.name, row.calls, row.dequantizations) for row in report(model).rows]
    with paused(model) as inside:
        assert inside is model
        assert not any(isinstance(parameter, FP8Weight) for parameter in model.parameters())
        assert model.head.weight is model.embedding.weight
        for _ in range(3):
            torch.testing.assert_close(model(IDS), dense(IDS), rtol=1e-5, atol=1e-5)
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(parameters(model), held, strict=True))
    assert activity == [(row.name, row.calls, row.dequantizations) for row in report(model).rows]
    after = model(IDS)
    assert all(after.equal(one) for one in before[1:])
    if storage != "discard":
        assert (after - dense(IDS)).norm() > 1e-4 * after.norm()


@torch.no_grad()
def test_one_of_fused_siblings() -> None:
    block = nn.ModuleDict({name: nn.Linear(32, 16) for name in ("q_proj", "k_proj", "v_proj")})
    enable_fp8_gemm(block, options=FP8GemmOptions(fp16_weight_storage="keep"))
    fuse_siblings(block)
    x = torch.randn(4, 32)
    for _ in range(3):
        expected = [layer(x) for layer in block.values()]
    with paused(block["q_proj"]):
        found = [layer(x) for layer in block.values()]
        assert not found[0].equal(expected[0])
        torch.testing.assert_close(found[1:], expected[1:])
    torch.testing.assert_close([layer(x) for layer in block.values()], expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block(error: type[BaseException]) -> None:
    model, _ = made("discard")
    before = model(IDS)
    with pytest.raises(error), paused(model):
        raise error
    assert model(IDS).equal(before)


@torch.no_grad()
def test_pauses_inside_pauses() -> None:
    model, dense = made("keep")
    with paused(model):
        with paused(model.head), paused(model):
            pass
        torch.testing.assert_close(model(IDS), dense(IDS))
    with paused(model.head):
        with paused(model):
            torch.testing.assert_close(model(IDS), dense(IDS))
        assert isinstance(model.down_proj.weight, FP8Weight)
    assert all(isinstance(model.get_submodule(name).weight, FP8Weight) for name in ("down_proj", "head", "embedding"))


@pytest.mark.parametrize("how", ["written", "assigned"])
@pytest.mark.parametrize("storage", STORAGES)
@torch.no_grad()
def test_what_a_block_writes_is_quantized_after_it(storage: str, how: str) -> None:
    layer = nn.Linear(64, 32)
    twin = enable_fp8_gemm(copy.deepcopy(layer))
    model = enable_fp8_gemm(layer, options=FP8GemmOptions(fp16_weight_storage=storage))
    values = torch.randn(32, 64)
    with paused(model):
        if how == "written":
            model.weight.copy_(values)
        else:
            model.weight = nn.Parameter(values)
    twin.weight.copy_(values)
    x = torch.randn(3, 64)
    assert isinstance(model.weight, FP8Weight)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-2, atol=1e-2)
    assert (model(x) - F.linear(x, values, model.bias)).norm() < 0.05 * model(x).norm()


def test_state_dicts_of_a_paused_model_are_dense() -> None:
    model, dense = made("keep")
    with paused(model):
        state = model.state_dict()
        assert state.keys() == dense.state_dict().keys()
        assert all(state[name].equal(value) for name, value in dense.state_dict().items())
    assert "head.weight_scale" in model.state_dict()


@torch.no_grad()
def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32)), options=FP8GemmOptions(fp16_weight_storage="keep"))
    compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(3, 64)
    before = compiled(x)
    with paused(model):
        torch.testing.assert_close(compiled(x), F.linear(x, model[0].weight, model[0].bias))
    assert compiled(x).equal(before)


def test_a_model_without_fp8_weights_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"no FP8 weights to pause: call enable_fp8_gemm\(model\) first"),
        paused(nn.Linear(8, 8)),
    ):
        pass
