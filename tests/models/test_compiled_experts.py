"""Experts of transformers inside compiled graphs: on FP8, counted, and compiled as often as in the dense model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from graphs import compiled, reads_of_bytes
from torch import fx, nn

from fp8gemm import enable_fp8_gemm, report

TOKENS = torch.arange(2 * 11).view(2, 11) % 99
COMMON = {
    **{"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16},
    **{"num_key_value_heads": 2, "num_experts_per_tok": 2},
}
MODELS: dict[str, Callable[[], Any]] = {
    "stacks [E, N, K]": lambda: transformers.Qwen3MoeConfig(**COMMON, moe_intermediate_size=48, num_experts=8),
    "stacks [E, K, N] with biases": lambda: transformers.GptOssConfig(
        **COMMON, intermediate_size=48, num_local_experts=4
    ),
}


def made(name: str, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(MODELS[name]()).eval()
    model.set_experts_implementation(implementation)
    return model


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("stacks [E, N, K]", "batched_mm"),
        ("stacks [E, N, K]", "grouped_mm"),
        ("stacks [E, K, N] with biases", "grouped_mm"),
    ],
)
@torch.no_grad()
def test_experts_of_a_whole_graph_run_on_fp8(name: str, implementation: str) -> None:
    """For any number of tokens by the same graphs as in the dense model."""
    counts = []
    for patched in (True, False):
        model = made(name, implementation)
        if patched:
            enable_fp8_gemm(model)
        expected = model(input_ids=TOKENS, use_cache=False)[0]
        before = {row.name: row.calls for row in report(model).converted} if patched else {}
        graphs: list[fx.GraphModule] = []
        one = compiled(model, graphs)
        torch.testing.assert_close(one(input_ids=TOKENS, use_cache=False)[0], expected, rtol=1e-4, atol=1e-4)
        if patched:
            assert [reads_of_bytes(graph) for graph in graphs] == [[]]
            for row in report(model).converted:
                assert (row.calls, row.dequantizations) == (before[row.name] + 1, 0), row.name
        for tokens in (3, 5):
            inputs = TOKENS[:, :tokens].contiguous()
            found = one(input_ids=inputs, use_cache=False)[0]
            torch.testing.assert_close(found, model(input_ids=inputs, use_cache=False)[0], rtol=1e-4, atol=1e-4)
        counts.append(len(graphs))
    assert counts[0] == counts[1]


@torch.no_grad()
def test_experts_one_by_one_run_on_fp8_between_graphs() -> None:
    """transformers runs the loop over experts with tokens in eager mode."""
    model = enable_fp8_gemm(made("stacks [E, N, K]", "eager"))
    expected = model(input_ids=TOKENS, use_cache=False)[0]
    graphs: list[fx.GraphModule] = []
    found = compiled(model, graphs)(input_ids=TOKENS, use_cache=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert graphs
    assert not any(reads_of_bytes(graph) for graph in graphs)
    assert not any(row.dequantizations for row in report(model).converted)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_gradients_of_a_compiled_mixture(implementation: str) -> None:
    """Those of the embeddings, through experts and routers, are those of the same model in eager mode."""
    model = enable_fp8_gemm(made("stacks [E, N, K]", implementation), module_filter="*experts*")
    gradients = []
    for one in (model, compiled(model, [])):
        embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        one(inputs_embeds=embedded, use_cache=False)[0].square().sum().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_generation_with_a_static_cache_is_compiled() -> None:
    """As transformers compiles it: the same tokens as without, and no weight is dequantized."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**COMMON, moe_intermediate_size=48, num_experts=8)
    model = enable_fp8_gemm(transformers.AutoModelForCausalLM.from_config(config).eval())
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(TOKENS, **options)
    model.forward = compiled(model.forward, graphs := [])
    assert model.generate(TOKENS, cache_implementation="static", **options).equal(expected)
    assert graphs
    assert not any(reads_of_bytes(graph) for graph in graphs)
    assert not any(row.dequantizations for row in report(model).converted if "embed" not in row.name)
