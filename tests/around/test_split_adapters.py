"""peft's LoRA on models whose FP8 weights are replicated, sharded or split among ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from ranks import Case, Cases, Rank
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fp8gemm import enable_fp8_gemm
from fp8gemm.weights import FP8Weight

cases = Cases("peft: LoRA")
TARGETS = ["q_proj", "down_proj"]


def llama(rank: Rank) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().to(rank.device)


def adapted(model: nn.Module) -> nn.Module:
    """With adapters that are not zero."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    return get_peft_model(model, config)


def ids(rank: Rank, row: int) -> torch.Tensor:
    return ((torch.arange(9, device=rank.device) * 11 + row * 5) % 128).view(1, 9)


def loss(model: Any, rank: Rank, row: int) -> torch.Tensor:
    return model(input_ids=ids(rank, row), labels=ids(rank, row)).loss


def trains_alike(rank: Rank, model: nn.Module, wrapped: nn.Module, one: nn.Module, rows: int) -> None:
    """Three steps of AdamW give the losses and adapters of one process that sees all rows."""
    steps = [torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2) for net in (model, one)]
    for _ in range(3):
        for step in steps:
            step.zero_grad()
        found = loss(wrapped, rank, rank.number if rows > 1 else 0)
        expected = sum(loss(one, rank, row) for row in range(rows)) / rows
        found.backward()
        expected.backward()
        if rows == 1:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for step in steps:
            step.step()
    ours, theirs = dict(model.named_parameters()), dict(one.named_parameters())
    for name in (name for name in theirs if "lora_" in name):
        mine = ours[name].full_tensor() if hasattr(ours[name], "full_tensor") else ours[name]
        torch.testing.assert_close(mine, theirs[name], rtol=1e-3, atol=1e-4)


@cases.works("DistributedDataParallel")
def _(rank: Rank) -> None:
    model = adapted(enable_fp8_gemm(llama(rank)))
    trains_alike(rank, model, DistributedDataParallel(model), adapted(enable_fp8_gemm(llama(rank))), rank.world)


@cases.works("FSDP2, patched before or after it")
def _(rank: Rank) -> None:
    for patch_first in (True, False):
        model = adapted(enable_fp8_gemm(llama(rank)) if patch_first else llama(rank))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        if not patch_first:
            enable_fp8_gemm(model)
        base = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
        assert type(base.weight.to_local()) is FP8Weight
        assert base.weight.to_local().scaled().data.nbytes == 64 * 64 // rank.world
        trains_alike(rank, model, model, adapted(enable_fp8_gemm(llama(rank))), rank.world)


@cases.works("tensor parallelism, with adapters on the split layers")
def _(rank: Rank) -> None:
    model = adapted(enable_fp8_gemm(llama(rank)))
    place = init_device_mesh(rank.device.type, (rank.world,))
    for layer in model.base_model.model.model.layers:
        plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
        down = {f"down_proj.{part}": RowwiseParallel() for part in ("base_layer", "lora_A.default")}
        parallelize_module(layer.mlp, place, {**plan, **down})
    assert type(layer.mlp.down_proj.base_layer.weight.to_local()) is FP8Weight
    one = adapted(enable_fp8_gemm(llama(rank)))
    torch.testing.assert_close(loss(model, rank, 0), loss(one, rank, 0), rtol=1e-4, atol=1e-4)
    trains_alike(rank, model, model, one, 1)


@pytest.mark.parametrize("case", cases.all(), ids=str)
def test_split_adapters(case: Case, world: int, backend: str) -> None:
    case.check(world, backend)
