"""What matrices are for: by their shapes, and by the path of the data where the model runs once."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from toys import WIDTH, Diffusion, latents

from fp8gemm import enable_fp8_gemm
from fp8gemm.analysis import flow
from fp8gemm.analysis.roles import roles

DIFFUSION = {
    "patches": "embedder",
    "t.0": "timestep",
    "t.2": "timestep",
    "text": "embedder",
    "blocks.#.attn.qkv": "attention",
    "blocks.#.attn.proj": "attention",
    "blocks.#.mlp.0": "mlp",
    "blocks.#.mlp.2": "mlp",
    "blocks.#.ada.1": "modulation",
    "ada.1": "modulation",
    "out": "final projection",
}


def of(model: nn.Module, inputs: object = None, prefix: str = "") -> dict[str, str]:
    """The roles, where blocks that are alike have the same."""
    found: dict[str, str] = {}
    for name, role in roles(model, inputs).items():
        key = re.sub(rf"(?<={prefix})\d+(?=\.)", "#", name, count=1) if prefix else name
        assert found.setdefault(key, role) == role, name
    return found


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_diffusion_transformer(batch: int, blocks: int) -> None:
    model = Diffusion(blocks)
    assert of(model, prefix=r"blocks\.") == DIFFUSION
    assert of(model, latents(batch), r"blocks\.") == DIFFUSION


def test_names_do_not_matter_where_the_model_runs() -> None:
    """The timestep goes by the name of a text, and the text by the name of a timestep."""
    model = Diffusion()
    model.caption, model.time = model.t, model.text
    forward = Diffusion.forward
    del model.t, model.text

    class Renamed(Diffusion):
        t = property(lambda self: self.caption)
        text = property(lambda self: self.time)

    model.__class__ = Renamed
    assert Renamed.forward is forward
    found = roles(model, latents())
    assert (found["caption.0"], found["caption.2"], found["time"]) == ("timestep", "timestep", "embedder")


def test_patched_models_have_the_same_roles() -> None:
    model = enable_fp8_gemm(Diffusion())
    assert of(model, prefix=r"blocks\.") == DIFFUSION
    assert of(model, latents(), r"blocks\.") == DIFFUSION


def test_a_projection_before_attention_is_no_modulation_for_its_width() -> None:
    """A projection to a multiple of the width modulates only if it has one row a sample."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, WIDTH)
            self.wide = nn.Linear(WIDTH, 6 * WIDTH)
            self.out = nn.Linear(6 * WIDTH, 7)
            self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.wide(self.norm(self.inner(x))))

    assert roles(Wide(), torch.randn(2, 5, 32)) == {"inner": "embedder", "wide": "other", "out": "final projection"}


def llama() -> tuple[nn.Module, dict[str, str], str]:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    attention = {f"model.layers.#.self_attn.{name}_proj": "attention" for name in "qkvo"}
    mlp = {f"model.layers.#.mlp.{name}_proj": "mlp" for name in ("gate", "up", "down")}
    return model, {"model.embed_tokens": "embedder", **attention, **mlp, "lm_head": "head"}, r"layers\."


def mixtral() -> tuple[nn.Module, dict[str, str], str]:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    attention = {f"model.layers.#.self_attn.{name}_proj": "attention" for name in "qkvo"}
    mlp = {f"model.layers.#.mlp.experts.{name}_proj": "mlp" for name in ("gate_up", "down")}
    router = {"model.layers.#.mlp.gate": "router"}
    return model, {"model.embed_tokens": "embedder", **attention, **router, **mlp, "lm_head": "head"}, r"layers\."


def bert() -> tuple[nn.Module, dict[str, str], str]:
    """Of the shape of MiniLM."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    model = transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=4))
    tables = {f"embeddings.{name}_embeddings": "embedder" for name in ("word", "position", "token_type")}
    attention = ("self.query", "self.key", "self.value", "output.dense")
    block = {f"encoder.layer.#.attention.{name}": "attention" for name in attention}
    block |= {"encoder.layer.#.intermediate.dense": "mlp", "encoder.layer.#.output.dense": "mlp"}
    return model, {**tables, **block, "pooler.dense": "final projection"}, r"layer\."


@pytest.mark.parametrize("made", [llama, mixtral, bert])
def test_models_of_transformers(made: Any) -> None:
    model, expected, prefix = made()
    assert of(model, prefix=prefix) == expected
    assert of(model, {"input_ids": torch.arange(12).view(2, 6)}, prefix) == expected


def test_torchs_own_transformer() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2, enable_nested_tensor=False
    )
    expected = {
        "layers.#.self_attn.in_proj_weight": "attention",
        "layers.#.self_attn.out_proj": "attention",
        "layers.#.linear1": "mlp",
        "layers.#.linear2": "mlp",
    }
    assert of(model, prefix=r"layers\.") == expected
    assert of(model, torch.randn(2, 5, 64), r"layers\.") == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_models_of_one_or_two_layers() -> None:
    assert roles(nn.Linear(64, 64)) == {"": "final projection"}
    assert roles(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))) == {
        "0": "embedder",
        "2": "final projection",
    }
    assert roles(nn.ReLU()) == {}


def test_what_was_observed() -> None:
    """The rows of each product, and their order, which is not that of the modules."""
    seen = flow.flow(Diffusion(1), latents(3))
    assert {name: seen[name].rows for name in ("t.0", "ada.1", "patches", "text", "out")} == {
        "t.0": 3,
        "ada.1": 3,
        "patches": 3 * 16,
        "text": 3 * 3,
        "out": 3 * 19,
    }
    assert sorted(seen, key=lambda name: seen[name].order)[:4] == ["t.0", "t.2", "patches", "text"]
    assert [name for name, one in seen.items() if one.scored] == ["blocks.0.attn.qkv"]
    assert [name for name, one in seen.items() if one.after_scores] == ["blocks.0.attn.proj"]


def test_inputs_without_a_tensor() -> None:
    with pytest.raises(ValueError, match="example_inputs has no tensor"):
        roles(Diffusion(), {"x": 3})
