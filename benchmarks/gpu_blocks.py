"""Two stacks of transformer blocks in plain PyTorch with random weights, like Llama-3.1-8B and like FLUX.1's
single-stream blocks. Nothing in them is tailored to fp8gemm: their Linears are those of the models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """``cached`` is the number of positions in a static key-value cache, of which a call writes the last; 0: no
    cache."""

    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    blocks: int = 4
    cached: int = 0

    @property
    def head(self) -> int:
        return self.hidden // self.heads


class Rotary(nn.Module):
    """Cosines and sines of ``positions [T]``, as ``[T, head]``."""

    def __init__(self, positions: torch.Tensor, head: int) -> None:
        super().__init__()
        frequency = 500000.0 ** (-torch.arange(0, head, 2, device=positions.device) / head)
        angle = torch.outer(positions.float(), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [1, heads, T, head]`` with rotary position embeddings applied."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin


class Attention(nn.Module):
    """Grouped-query attention: causal over the tokens, or of the last token over the cache."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.q_proj = nn.Linear(sizes.hidden, sizes.heads * sizes.head, bias=False)
        self.k_proj = nn.Linear(sizes.hidden, sizes.kv_heads * sizes.head, bias=False)
        self.v_proj = nn.Linear(sizes.hidden, sizes.kv_heads * sizes.head, bias=False)
        self.o_proj = nn.Linear(sizes.heads * sizes.head, sizes.hidden, bias=False)
        if sizes.cached:
            shape = (1, sizes.kv_heads, sizes.cached, sizes.head)
            self.register_buffer("keys", torch.randn(shape))
            self.register_buffer("values", torch.randn(shape))
            self.register_buffer("last", torch.tensor([sizes.cached - 1]))

    def forward(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.sizes.head)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotary(q), rotary(k)
        if self.sizes.cached:
            k = self.keys.index_copy_(2, self.last, k)
            v = self.values.index_copy_(2, self.last, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=not self.sizes.cached, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden, sizes.mlp, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.mlp, bias=False)
        self.down_proj = nn.Linear(sizes.mlp, sizes.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(sizes.hidden, eps=1e-5)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = nn.RMSNorm(sizes.hidden, eps=1e-5)
        self.mlp = MLP(sizes)

    def forward(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Decoder blocks and the final norm: ``x [1, T, hidden]`` to the same shape."""

    def __init__(self, sizes: Sizes, tokens: int) -> None:
        super().__init__()
        start = max(sizes.cached - tokens, 0)
        self.rotary = Rotary(torch.arange(start, start + tokens), sizes.head)
        self.layers = nn.ModuleList(LlamaBlock(sizes) for _ in range(sizes.blocks))
        self.norm = nn.RMSNorm(sizes.hidden, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, self.rotary)
        return self.norm(x)


class FluxBlock(nn.Module):
    """Attention and MLP in parallel between two fused projections, modulated by a vector."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.modulation = nn.Linear(sizes.hidden, 3 * sizes.hidden)
        self.pre_norm = nn.LayerNorm(sizes.hidden, elementwise_affine=False, eps=1e-6)
        self.linear1 = nn.Linear(sizes.hidden, 3 * sizes.hidden + sizes.mlp)
        self.query_norm = nn.RMSNorm(sizes.head, eps=1e-6)
        self.key_norm = nn.RMSNorm(sizes.head, eps=1e-6)
        self.linear2 = nn.Linear(sizes.hidden + sizes.mlp, sizes.hidden)

    def forward(self, x: torch.Tensor, vector: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        shift, scale, gate = self.modulation(F.silu(vector)).unsqueeze(1).chunk(3, dim=-1)
        qkv, mlp = self.linear1((1 + scale) * self.pre_norm(x) + shift).split(
            [3 * self.sizes.hidden, self.sizes.mlp], dim=-1
        )
        q, k, v = qkv.unflatten(-1, (3, self.sizes.heads, self.sizes.head)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotary(self.query_norm(q)), rotary(self.key_norm(k)), v)
        y = y.transpose(1, 2).flatten(2)
        return x + gate * self.linear2(torch.cat((y, F.gelu(mlp, approximate="tanh")), dim=-1))


class Flux(nn.Module):
    """Single-stream blocks: ``x [1, T, hidden]`` to the same shape."""

    def __init__(self, sizes: Sizes, tokens: int) -> None:
        super().__init__()
        self.rotary = Rotary(torch.arange(tokens), sizes.head)
        self.register_buffer("vector", torch.randn(1, sizes.hidden))
        self.blocks = nn.ModuleList(FluxBlock(sizes) for _ in range(sizes.blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, self.vector, self.rotary)
        return x


def built(kind: type[nn.Module], sizes: Sizes, tokens: int, device: str) -> tuple[nn.Module, torch.Tensor]:
    """A stack in bfloat16 on ``device``, with weights scaled to keep a unit variance, and an input for it."""
    torch.manual_seed(0)
    with torch.device(device):
        model = kind(sizes, tokens)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        x = torch.randn(1, tokens, sizes.hidden, dtype=torch.bfloat16)
    return model.to(torch.bfloat16).eval().requires_grad_(False), x
