"""Small random transformers architectures: nearly all multiply-adds with weights run on FP8, and the outputs are those
of the same model with its weights dequantized."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fp8gemm import FP8GemmOptions, disable_fp8_gemm, enable_fp8_gemm, report

IDS = torch.randint(20, 400, (2, 12), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
TEXT = {"input_ids": IDS}
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
BOTH = {"input_ids": IDS, "pixel_values": IMAGES}

# Names of sizes differ between models; a width of 128 keeps depthwise convolutions and routers small in relation.
GPT = {"vocab_size": 512, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}
WIDE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
FULL = {**WIDE, "intermediate_size": 256}
LLAMA = {**FULL, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}
TOWERS = {
    "text_config": {**FULL, "max_position_embeddings": 64, "projection_size": 128},
    "vision_config": {**FULL, "image_size": 32, "patch_size": 8},
}
MIXTURE = {**FULL, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 128}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "GPT2LMHeadModel": ("GPT2Config", GPT, TEXT),
    "OpenAIGPTLMHeadModel": ("OpenAIGPTConfig", GPT, TEXT),
    "FalconForCausalLM": ("FalconConfig", WIDE, TEXT),
    "BloomForCausalLM": ("BloomConfig", {"vocab_size": 512, "hidden_size": 128, "n_layer": 2, "n_head": 4}, TEXT),
    "OPTForCausalLM": ("OPTConfig", {**WIDE, "ffn_dim": 256, "word_embed_proj_dim": 64}, TEXT),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", FULL, TEXT),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA, TEXT),
    "GemmaForCausalLM": ("GemmaConfig", LLAMA, TEXT),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 512, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4},
        PAIR,
    ),
    "CLIPModel": ("CLIPConfig", {**TOWERS, "projection_dim": 128}, BOTH),
    "SiglipModel": ("SiglipConfig", TOWERS, BOTH),
    "DebertaForMaskedLM": ("DebertaConfig", {**FULL, "relative_attention": True, "pos_att_type": "c2p|p2c"}, TEXT),
    "MptForCausalLM": ("MptConfig", {"vocab_size": 512, "d_model": 128, "n_layers": 2, "n_heads": 4}, TEXT),
    "MambaForCausalLM": ("MambaConfig", {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2}, TEXT),
    "JambaForCausalLM": (
        "JambaConfig",
        {**MIXTURE, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 8},
        TEXT,
    ),
    "DbrxForCausalLM": (
        "DbrxConfig",
        {
            **{"vocab_size": 512, "d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
            **{"ffn_config": EXPERTS, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
        },
        TEXT,
    ),
}


def made(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    config, sizes, inputs = CASES[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval(), inputs


def answer(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        y = model(**inputs)
    found: torch.Tensor = y.logits if "logits" in y else y.logits_per_image
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")
def test_nearly_all_multiply_adds_run_on_fp8(name: str) -> None:
    model, inputs = made(name)
    before = answer(model, inputs)
    enable_fp8_gemm(model)
    after = answer(model, inputs)
    assert 0 < (after - before).norm() / before.norm() < 0.3
    found = report(model)
    found.check(coverage=0.99)
    assert found.coverage is not None
    assert not found.coverage.dequantized
    dense, _ = disable_fp8_gemm(copy.deepcopy(model))
    expected = answer(dense, inputs)
    # Both sum in float32 in different orders: about 2^-23 of the largest value for each of a dozen layers.
    assert torch.allclose(after, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_memory_that_is_freed_and_used_again_during_the_pass() -> None:
    """Original weights are freed one after the other, and FP8 bytes of later layers are put where they were."""
    layers = [layer for _ in range(24) for layer in (nn.Linear(64, 16), nn.Linear(16, 64))]
    model = nn.Sequential(*layers)
    enable_fp8_gemm(model, options=FP8GemmOptions(materialize_fp8_on_wrap=False, scheme="weight_only"))
    model(torch.randn(5, 64, requires_grad=True))
    coverage = report(model).coverage
    assert coverage is not None
    assert coverage.fp8 == {f"{index}.weight": 5 * 16 * 64 for index in range(len(layers))}


@pytest.mark.parametrize("grad", [False, True])
def test_the_observed_pass_runs_the_kernels_of_later_ones(grad: bool) -> None:
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32)))
    kernels = []
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            model(torch.randn(3, 64))
            kernels.append({name for name, _ in report(model).rows[0].kernels})
    assert kernels[0] == kernels[2]
