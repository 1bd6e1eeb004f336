"""Real transformers architectures, tiny and random: patched in every storage mode, compared with themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, report

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TOKENS = torch.arange(2 * 11).view(2, 11) % 99


def t5() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return transformers.T5Model(config), {"input_ids": TOKENS, "decoder_input_ids": TOKENS}


def bert() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return transformers.BertModel(transformers.BertConfig(vocab_size=99, **SMALL)), {"input_ids": TOKENS}


def llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, **SMALL)
    return transformers.LlamaModel(config), {"input_ids": TOKENS}


def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, tie_word_embeddings=False)
    return transformers.GPT2LMHeadModel(config), {"input_ids": TOKENS}


def vit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)
    return transformers.ViTModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def whisper() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.WhisperConfig(
        vocab_size=99,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperModel(config), {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": TOKENS}


@pytest.mark.parametrize("storage", ["keep", "cpu_offload", "discard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [t5, bert, llama, gpt2, vit, whisper])
def test_architecture(make: Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]], dtype, storage: str) -> None:
    plain, inputs = make()
    plain = plain.to(dtype).eval()
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    model = enable_fp8_gemm(copy.deepcopy(plain), options=FP8GemmOptions(fp16_weight_storage=storage))
    with torch.no_grad():
        expected, found = plain(**inputs)[0], model(**inputs)[0]
    assert found.dtype == expected.dtype
    error = (found - expected).norm() / expected.norm()
    assert 0 < error <= 0.08
    rows = report(model)
    named = {row.name for row in rows.converted} | {name for row in rows.converted for name in row.ties}
    assert {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)} <= named
    assert all("convolution" in row.reason for row in rows.kept)
    for row in rows.converted:
        assert row.calls >= 1 or "pooler" in row.name, f"{row.name} did not run"
        assert row.dequantizations == 0, f"{row.name} was dequantized"


def test_what_is_not_a_linear_is_converted_too() -> None:
    """GPT-2's projections are Conv1D, and its head is tied to the embeddings."""
    model, _ = gpt2()
    model.lm_head.weight = model.transformer.wte.weight
    enable_fp8_gemm(model)
    rows = {row.name: row for row in report(model).converted}
    assert not report(model).kept
    assert rows["transformer.h.0.attn.c_attn"].shape == (192, 64)
    assert rows["transformer.h.0.attn.c_attn"].bytes_before == 64 * 192 * 4
    assert rows["lm_head"].ties == ("transformer.wte",)


@pytest.mark.parametrize("make", [bert, llama, vit])
def test_compiles_whole(make: Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]) -> None:
    model, inputs = make()
    enable_fp8_gemm(model.eval())
    if "input_ids" in inputs and hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs)[0], model(**inputs)[0], atol=1e-5)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_generates_with_a_static_cache_and_a_compiled_forward(fullgraph: bool) -> None:
    """What transformers does by itself on a GPU: the cache is a structure of dicts that each forward changes."""
    config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, eos_token_id=98, pad_token_id=0, **SMALL)
    model = enable_fp8_gemm(transformers.LlamaForCausalLM(config).eval())
    asked = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    eager = model.generate(TOKENS[:1], **asked)
    torch._dynamo.utils.counters.clear()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=fullgraph)
    assert model.generate(TOKENS[:1], **asked).equal(eager)
    assert not torch._dynamo.utils.counters["graph_break"]
