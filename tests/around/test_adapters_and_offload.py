"""peft's LoRA on patched models, and accelerate's offloading of them.

Not part of the ordinary run: ``pip install peft accelerate transformers``, then ``pytest tests/around``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fp8gemm import FP8GemmOptions, FP8Linear, enable_fp8_gemm, report

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("default")

STORAGES = ("keep", "cpu_offload", "discard")
IDS = torch.arange(18).view(2, 9) % 64
CPU = torch.device("cpu")


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return transformers.LlamaForCausalLM(config)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("patched_first", [True, False])
def test_lora_attaches_trains_merges_and_unmerges(storage: Any, patched_first: bool) -> None:
    options = FP8GemmOptions(fp16_weight_storage=storage)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model = llama()
    if patched_first:
        enable_fp8_gemm(model, options=options)
        model = peft.get_peft_model(model, adapters)
    else:
        model = peft.get_peft_model(model, adapters)
        enable_fp8_gemm(model, options=options, module_filter="*.base_layer")
    bases = [module for module in model.modules() if isinstance(module, FP8Linear)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [base.scaled().data.clone() for base in bases]
    optimizer = torch.optim.Adam(trained, 3e-3)
    losses = []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    same = (base.scaled().data.view(torch.uint8).equal(old.view(torch.uint8)) for base, old in zip(bases, before))  # noqa: B905
    assert all(same), "training changed a frozen weight"
    model.eval()
    with torch.no_grad():
        y = model(IDS).logits
        model.merge_adapter()
        assert error(model(IDS).logits, y) <= 0.08
        model.unmerge_adapter()
        assert error(model(IDS).logits, y) <= (1e-5 if storage != "discard" else 0.12)
        merged = model.merge_and_unload()
        assert isinstance(merged.model.layers[0].self_attn.q_proj, FP8Linear)
        assert error(merged(IDS).logits, y) <= 0.12


def _all_to_cpu(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


def _all_to_disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device=CPU)


def _dispatched(model: nn.Module, folder: Path) -> None:
    accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)


OFFLOADS = (_all_to_cpu, _all_to_disk, _dispatched)


@torch.no_grad()
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("offload", OFFLOADS, ids=lambda value: value.__name__.strip("_"))
def test_offloading_a_patched_model(offload: Callable[..., None], storage: Any, tmp_path: Path) -> None:
    """Everything but the FP8 bytes moves in and out, as buffers stay by default; nothing is dequantized."""
    model = enable_fp8_gemm(llama().eval(), options=FP8GemmOptions(fp16_weight_storage=storage))
    expected = model(IDS).logits
    offload(model, tmp_path)
    for _ in range(3):
        assert model(IDS).logits.equal(expected)
    assert all(row.dequantizations == 0 for row in report(model).converted)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)


@torch.no_grad()
@pytest.mark.parametrize("offload", [_all_to_cpu, _all_to_disk])
def test_what_is_offloaded_already_is_not_converted_by_halves(offload: Callable[..., None], tmp_path: Path) -> None:
    model = llama().eval()
    offload(model, tmp_path)
    with pytest.raises(
        ValueError, match="its weight is offloaded by accelerate: patch the model before it is offloaded"
    ):
        enable_fp8_gemm(model)
    assert not any(isinstance(module, FP8Linear) for module in model.modules())
