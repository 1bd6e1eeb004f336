"""Dense checkpoints loaded into models that were patched on meta: quantized by the options of each layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from fp8gemm import FP8GemmOptions, FP8Linear, FP8Weight, enable_fp8_gemm, load_checkpoint, report

TOKENS = torch.arange(11).view(1, 11) % 64
SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)).eval()


def mixture() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    return transformers.Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize("storage", ["discard", "keep"])
@pytest.mark.parametrize("scheme", ["row", "block"])
@pytest.mark.parametrize("make", [llama, mixture])
def test_dense_weights_are_quantized(make, scheme, storage, tmp_path: Path) -> None:
    dense = make()
    dense.save_pretrained(tmp_path)
    options = FP8GemmOptions(scheme=scheme, fp16_weight_storage=storage)
    with torch.device("meta"):
        model = make()
    enable_fp8_gemm(model, options=options)
    count = sum(isinstance(parameter, FP8Weight) for parameter in model.parameters())
    kinds = [type(module) for module in model.modules()]
    original = dense.lm_head.weight.detach().clone()
    load_checkpoint(model, tmp_path)
    expected = enable_fp8_gemm(dense, options=options)
    assert sum(isinstance(parameter, FP8Weight) for parameter in model.parameters()) == count
    assert [type(module) for module in model.modules()] == kinds
    assert [row.name for row in report(model).kept] == [row.name for row in report(expected).kept]
    assert model(TOKENS).logits.equal(expected(TOKENS).logits)
    assert isinstance(model.lm_head, FP8Linear)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (make is llama)
    kept = model.lm_head.original_weight
    assert kept is None if storage == "discard" else kept.equal(original)
