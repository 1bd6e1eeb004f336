"""Graphs as torch.compile makes them, below autograd, and what in them reads FP8 bytes."""

from __future__ import annotations

from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

aten = torch.ops.aten

VIEWS = (aten.slice.Tensor, aten.view.dtype, aten.alias.default)


def compiled(model: nn.Module, graphs: list[fx.GraphModule]) -> nn.Module:
    """The model compiled by a backend that keeps the graphs below autograd and runs them as they are."""

    def keep(graph: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    return torch.compile(model, backend=aot_autograd(fw_compiler=keep))


def reads_of_bytes(graph: fx.GraphModule) -> list[str]:
    """The operations of a graph that read FP8 bytes and neither are our products nor take views."""
    found = []
    for node in graph.graph.nodes:
        values = [factor.meta.get("val") for factor in node.all_input_nodes]
        if any(isinstance(value, torch.Tensor) and value.dtype == torch.float8_e4m3fn for value in values):
            ours = node.op == "output" or node.target in VIEWS or "fp8gemm" in str(node.target)
            found += [] if ours else [str(node.target)]
    return found
