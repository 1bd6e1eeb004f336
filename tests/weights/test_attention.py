"""torch's attention layers in compiled graphs, where Dynamo chooses their fused operations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graphs import compiled, reads_of_bytes
from torch import fx, nn

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, report

OPTIONS = FP8GemmOptions(scheme="weight_only")
CAUSAL = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
PADDING = torch.arange(6).expand(3, 6) >= torch.tensor([6, 4, 5])[:, None]
LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # arguments of the layer, and of its forward
    "plain": ({}, {}),
    "norm first, gelu": ({"norm_first": True, "activation": "gelu"}, {"src_mask": CAUSAL}),
    "without bias": ({"bias": False}, {"src_key_padding_mask": PADDING}),
    "batch second": ({"batch_first": False}, {"src_mask": CAUSAL, "src_key_padding_mask": PADDING}),
    "padded": ({"norm_first": True}, {"src_mask": CAUSAL, "src_key_padding_mask": PADDING}),
    "added mask": ({}, {"src_mask": torch.zeros(6, 6).masked_fill(CAUSAL, float("-inf"))}),
}
ATTENTION: dict[str, dict[str, Any]] = {
    "weights": {"need_weights": True},
    "weights of every head": {"need_weights": True, "average_attn_weights": False},
    "without weights": {"need_weights": False},
    "padded": {"need_weights": True, "key_padding_mask": PADDING},
    "masked": {"need_weights": False, "attn_mask": CAUSAL},
}


def patched(layer: nn.Module) -> nn.Module:
    return enable_fp8_gemm(layer.eval(), options=OPTIONS, module_filter=lambda name, module: True)


def once_compiled(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The output of the compiled model, of which each weight was one more time a factor and none was dequantized."""
    torch._dynamo.reset()
    before = [row.calls for row in report(model).converted]
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(*args, **kwargs)
    assert [row.calls for row in report(model).converted] == [calls + 1 for calls in before]
    assert not any(row.dequantizations for row in report(model).converted)
    return y


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_encoder_layers(name: str) -> None:
    torch.manual_seed(0)
    arguments, options = LAYERS[name]
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, **{"batch_first": True, **arguments}).eval()
    x = torch.randn(6, 3, 32) if arguments.get("batch_first") is False else torch.randn(3, 6, 32)
    model = patched(copy.deepcopy(layer))
    expected = model(x, **options)
    torch.testing.assert_close(once_compiled(model, x, **options), expected, rtol=1e-5, atol=1e-5)
    assert 0 < (expected - layer(x, **options)).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("other", ["itself", "its values", "keys and values"])
@torch.no_grad()
def test_attention(name: str, other: str) -> None:
    """Of a sequence to itself, to another, and to one whose values differ from its keys."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 6, 32).unbind()
    inputs = {"itself": (q, q, q), "its values": (q, k, k), "keys and values": (q, k, v)}[other]
    model = patched(nn.MultiheadAttention(32, 4, batch_first=True))
    expected, shares = model(*inputs, **ATTENTION[name])
    graphs: list[fx.GraphModule] = []
    y, found = compiled(model, graphs)(*inputs, **ATTENTION[name])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, shares, rtol=1e-5, atol=1e-5)
    assert [reads_of_bytes(graph) for graph in graphs] == [[]]
