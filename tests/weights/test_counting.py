"""Counting, averaging, clipping, optimizing and casting a model's parameters treats FP8 weights like dense ones."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fp8gemm import FP8GemmOptions, FP8Linear, FP8Weight, UnsupportedError, enable_fp8_gemm


def mlp(storage: str = "discard") -> tuple[nn.Module, nn.Module]:
    """The same model dense and patched."""
    dense = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False)).bfloat16()
    options = FP8GemmOptions(fp16_weight_storage=storage)  # type: ignore[arg-type]
    return dense, enable_fp8_gemm(copy.deepcopy(dense), options=options)


def test_parameters_are_counted() -> None:
    dense, model = mlp()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in dense.parameters())
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in dense.named_parameters()
    }
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    wanted = [p.dequantize() if isinstance(p, FP8Weight) else p for p in model.parameters()]
    assert vector.equal(torch.cat([p.view(-1) for p in wanted]))


def test_transformers_counts() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    dense = transformers.LlamaForCausalLM(config).bfloat16()
    for storage in ("discard", "keep"):
        options = FP8GemmOptions(fp16_weight_storage=storage)  # type: ignore[arg-type]
        model = enable_fp8_gemm(copy.deepcopy(dense), options=options)
        assert model.num_parameters() == dense.num_parameters()
        assert model.dtype == torch.bfloat16
        held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        assert model.get_memory_footprint() == held
        assert (held < dense.get_memory_footprint()) == (storage == "discard")


def test_optimizers_and_clipping_leave_it_alone() -> None:
    _, model = mlp()
    before = [(p, p.scaled().data.view(torch.uint8).clone()) for p in model.parameters() if isinstance(p, FP8Weight)]
    bias = model[0].bias.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(torch.randn(3, 64, dtype=torch.bfloat16)).float().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert norm.isclose(model[0].bias.grad.norm(), rtol=1e-2) or norm > 1.0
    optimizer.step()
    assert not model[0].bias.equal(bias)
    assert all(p.grad is None and p.scaled().data.view(torch.uint8).equal(data) for p, data in before)
    for ask in (model.requires_grad_, model[0].weight.requires_grad_):
        with pytest.raises(UnsupportedError, match="takes no gradient: train adapters beside it"):
            ask(True)
    model.requires_grad_(False)


def test_moving_averages() -> None:
    """Averages in full precision: rounding every small step to FP8 would lose them all."""
    _, model = mlp()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    average.update_parameters(model)
    twin = model[0].weight.dequantize().float()
    target = torch.randn_like(twin)
    with torch.no_grad():
        model[0].weight.copy_(target)
    wanted = twin
    for _ in range(20):
        average.update_parameters(model)
        wanted = wanted.lerp(target.bfloat16().float(), 0.01)
    found = average.module[0].weight.dequantize().float()
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    assert not model[0].weight.dequantize().float().equal(found)


CASTS = {
    "module": lambda layer, dtype: layer.to(dtype),
    "type": lambda layer, dtype: layer.type(dtype),
    "device too": lambda layer, dtype: layer.to("cpu", dtype),
    "data": lambda layer, dtype: setattr(layer.weight, "data", layer.weight.data.to(dtype)),
    "like another": lambda layer, dtype: setattr(
        layer.weight, "data", layer.weight.data.to(torch.ones(1, dtype=torch.float32).to(dtype))
    ),
}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("cast", CASTS)
def test_casts_to_float8_change_nothing(cast: str, dtype: torch.dtype) -> None:
    """The weight is FP8 already: casting its values, as diffusers' layerwise casting does, would lose the scales."""
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    for storage in ("discard", "keep"):
        layer: Any = mlp(storage)[1][2]
        for _ in range(3):
            wanted = layer(x)
        weight, home, original = layer.weight, layer.home, layer.original_weight
        stored, version, activity = home.stored, home.version, home.activity
        kept = None if original is None else original.detach().clone()
        dequantized, bound = activity.dequantizations, dict(layer._bound)
        for _ in range(2):
            CASTS[cast](layer, dtype)
            layer.to(torch.bfloat16)
            assert layer(x).equal(wanted)
        assert isinstance(layer, FP8Linear)
        assert layer.weight is weight
        assert weight.dtype == torch.bfloat16
        assert (layer.home, home.stored, home.version) == (home, stored, version)
        assert layer._bound == bound
        assert activity.dequantizations == dequantized
        assert layer.original_weight is original
        assert original is None or original.equal(kept)


def test_casts_that_change_nothing_need_no_exchange() -> None:
    """nn.Module replaces subclasses by ``swap_tensors``, which fails if a weak reference to the parameter exists."""
    layer = mlp()[1][0]
    parameter = layer.weight
    reference = weakref.ref(parameter)
    for cast in (layer.bfloat16, layer.cpu, lambda: layer.to(torch.float8_e4m3fn), layer.half, layer.half):
        cast()
        assert layer.weight is parameter is reference()
    assert isinstance(parameter.to(torch.float16), nn.Parameter)
    assert parameter.dtype == torch.float16


def test_copies_beside_a_kept_original_keep_it_too() -> None:
    """Merges into a copy that is then assigned, as peft's safe merge does."""
    layer: Any = mlp("keep")[1][0]
    original, start = layer.original_weight, layer.original_weight.detach().clone()
    delta = torch.full_like(start, 2**-9)
    for _ in range(2):
        merged = layer.weight.data.clone()
        merged += delta
        layer.weight.data = merged
        start = start + delta
        layer(torch.randn(2, 64, dtype=torch.bfloat16))
        assert layer.original_weight is original
        assert original.equal(start)
    part = layer.weight.data[16:32].clone()
    part += delta[16:32]
    layer.weight.data[16:32] = part
    assert original[16:32].equal(start[16:32] + delta[16:32])
    assert original[:16].equal(start[:16])
