"""Real transformers architectures, small and random: patched in every storage mode and compared with themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from fp8gemm import FP8GemmOptions, FP8Weight, disable_fp8_gemm, enable_fp8_gemm, report

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
    """GPT-2's projections are Conv1D, and its output head is tied to the embeddings."""
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
    """What transformers does by default on a GPU: the cache is a structure of dicts that each forward changes."""
    config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, eos_token_id=98, pad_token_id=0, **SMALL)
    model = enable_fp8_gemm(transformers.LlamaForCausalLM(config).eval())
    asked = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    eager = model.generate(TOKENS[:1], **asked)
    torch._dynamo.utils.counters.clear()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=fullgraph)
    assert model.generate(TOKENS[:1], **asked).equal(eager)
    assert not torch._dynamo.utils.counters["graph_break"]


def tied_llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=96, tie_word_embeddings=True, **SMALL)
    return transformers.LlamaForCausalLM(config).eval()


def is_tied_in_fp8(model: nn.Module) -> bool:
    weight = model.lm_head.weight
    return weight is model.model.embed_tokens.weight and isinstance(weight, FP8Weight)


@torch.no_grad()
def test_tied_heads_are_one_fp8_parameter_through_all_that_one_does_with_them(tmp_path) -> None:
    plain = tied_llama()
    model = enable_fp8_gemm(copy.deepcopy(plain))
    assert is_tied_in_fp8(model)
    expected = plain(TOKENS).logits
    before = model(TOKENS).logits
    assert (before - expected).norm() / expected.norm() < 0.06  # the error from q, k, v and the MLP alone: 0.04
    assert all(row.dequantizations == 0 for row in report(model).rows)
    model.resize_token_embeddings(101, mean_resizing=False)
    assert is_tied_in_fp8(model)
    assert torch.equal(model(TOKENS).logits[..., :96], before)
    model.tie_weights()
    assert is_tied_in_fp8(model)
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (*TOKENS.shape[:-1], TOKENS.shape[-1] + 3)
    other = enable_fp8_gemm(tied_llama())
    other.resize_token_embeddings(101)
    other.load_state_dict(model.state_dict())
    assert is_tied_in_fp8(other)
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    model.bfloat16()
    assert is_tied_in_fp8(model)
    model.set_output_embeddings(nn.Linear(64, 101, bias=False))
    assert not isinstance(model.lm_head.weight, FP8Weight)
    assert isinstance(model.model.embed_tokens.weight, FP8Weight)
    undone, _ = disable_fp8_gemm(other)
    assert undone.lm_head.weight is undone.model.embed_tokens.weight


def test_a_tied_head_costs_a_language_model_about_what_its_other_layers_cost() -> None:
    """Kullback-Leibler divergence of the next token, for a trained bigram model, with and without the head in FP8."""
    torch.manual_seed(0)
    model = tied_llama()
    text = (torch.arange(4096) * 7 + torch.arange(4096) // 5 * 3) % 96
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = text[(torch.arange(8) * 61 + step * 17).view(-1, 1) % 4000 + torch.arange(32)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 3.0  # it has learned something: log(96) = 4.6
    batch = text[(torch.arange(8) * 113).view(-1, 1) % 4000 + torch.arange(32)]

    def divergence(module_filter: str | None) -> float:
        patched = enable_fp8_gemm(copy.deepcopy(model).eval(), module_filter=module_filter)
        with torch.no_grad():
            dense, fp8 = (one(batch).logits.log_softmax(-1) for one in (model.eval(), patched))
        return float((dense.exp() * (dense - fp8)).sum(-1).mean())

    others, head, both = divergence("!lm_head"), divergence("lm_head"), divergence(None)
    # Measured: 1e-4 and 2e-4 nats, from two layers and the head, which here is both the first and the last product.
    assert 0 < head < 4 * others
    assert both < 1e-3
