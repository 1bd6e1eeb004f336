"""Small random diffusers models with inputs: one row of the table each, if the installed version has the class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tiny_models import Unbuilt, filled
from torch import nn

Inputs = Callable[[], dict[str, Any]]


def _seeded(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def _steps(count: int = 2) -> torch.Tensor:
    return torch.full((count,), 500)


def _image(channels: int, *size: int, text: int = 64, **more: Any) -> Inputs:
    """A latent image or video, a text of 8 tokens and a timestep."""
    size = size or (16, 16)
    return lambda: {
        "hidden_states": _seeded(2, channels, *size),
        "encoder_hidden_states": _seeded(2, 8, text),
        "timestep": _steps(),
        **more,
    }


def _packed(channels: int, *, text: int = 64, **more: Any) -> Inputs:
    """An image of 8 x 8 patches as a sequence with position ids."""
    return lambda: {
        "hidden_states": _seeded(2, 64, channels),
        "encoder_hidden_states": _seeded(2, 8, text),
        "timestep": torch.full((2,), 0.5),
        **more,
    }


def _places(axes: int) -> dict[str, torch.Tensor]:
    return {"img_ids": torch.arange(64 * axes).view(64, axes) % 8, "txt_ids": torch.zeros(8, axes)}


def _mask(length: int = 8) -> dict[str, torch.Tensor]:
    return {"encoder_attention_mask": torch.ones(2, length)}


SIZES = {"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4}
JOINT = {**SIZES, "joint_attention_dim": 64}
FLUX = {**JOINT, "in_channels": 16, "num_single_layers": 2, "axes_dims_rope": (8, 12, 12)}
BLOCKS = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2

CASES: Mapping[str, tuple[dict[str, Any], Inputs]] = {
    "UNet2DConditionModel": (
        {
            **{"block_out_channels": (64, 128), "layers_per_block": 1, "sample_size": 16, "cross_attention_dim": 64},
            **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 4},
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        lambda: {"sample": _seeded(2, 4, 16, 16), "timestep": 500, "encoder_hidden_states": _seeded(2, 8, 64)},
    ),
    "UNet2DModel": (
        {
            **{"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 16},
            **{
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            },
        },
        lambda: {"sample": _seeded(2, 3, 16, 16), "timestep": 500},
    ),
    "AutoencoderKL": (
        {**BLOCKS, "down_block_types": DOWN, "up_block_types": UP},
        lambda: {"sample": _seeded(2, 3, 32, 32)},
    ),
    "AutoencoderTiny": ({}, lambda: {"sample": _seeded(1, 3, 32, 32)}),
    "VQModel": ({**BLOCKS, "down_block_types": DOWN, "up_block_types": UP}, lambda: {"sample": _seeded(2, 3, 32, 32)}),
    "AutoencoderKLWan": ({"base_dim": 16, "num_res_blocks": 1}, lambda: {"sample": _seeded(1, 3, 5, 32, 32)}),
    "AutoencoderKLQwenImage": ({"base_dim": 16, "num_res_blocks": 1}, lambda: {"sample": _seeded(1, 3, 1, 32, 32)}),
    "SD3Transformer2DModel": (
        {
            **JOINT,
            **{"sample_size": 16, "caption_projection_dim": 128, "pooled_projection_dim": 64, "in_channels": 4},
            **{"out_channels": 4, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        },
        _image(4, pooled_projections=_seeded(2, 64)),
    ),
    "FluxTransformer2DModel": (
        {**FLUX, "pooled_projection_dim": 64, "guidance_embeds": True},
        _packed(16, **_places(3), guidance=torch.ones(2), pooled_projections=_seeded(2, 64)),
    ),
    "Flux2Transformer2DModel": (
        {**JOINT, "in_channels": 16, "num_single_layers": 2, "axes_dims_rope": (8, 8, 8, 8)},
        _packed(16, **_places(4), guidance=torch.ones(2)),
    ),
    "ChromaTransformer2DModel": (
        {**FLUX, "approximator_hidden_dim": 128, "approximator_layers": 2},
        _packed(16, **_places(3)),
    ),
    "BriaTransformer2DModel": ({**FLUX}, _packed(16, **_places(3))),
    "QwenImageTransformer2DModel": (
        {**JOINT, "in_channels": 16, "out_channels": 4, "axes_dims_rope": (8, 12, 12)},
        _packed(16, encoder_hidden_states_mask=torch.ones(2, 8), img_shapes=[(1, 8, 8)] * 2),
    ),
    "DiTTransformer2DModel": (
        {**SIZES, "sample_size": 16, "num_embeds_ada_norm": 10},
        lambda: {"hidden_states": _seeded(2, 4, 16, 16), "timestep": _steps(), "class_labels": torch.arange(2)},
    ),
    "PixArtTransformer2DModel": (
        {
            **SIZES,
            **{"sample_size": 16, "cross_attention_dim": 128, "caption_channels": 64},
            "use_additional_conditions": False,
        },
        _image(4, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "AuraFlowTransformer2DModel": (
        {
            **{"sample_size": 16, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 32},
            **{"num_attention_heads": 4, "joint_attention_dim": 64, "caption_projection_dim": 128},
            "pos_embed_max_size": 64,
        },
        _image(4),
    ),
    "SanaTransformer2DModel": (
        {
            **SIZES,
            **{"num_cross_attention_heads": 4, "cross_attention_head_dim": 32, "cross_attention_dim": 128},
            **{"caption_channels": 64, "sample_size": 16},
        },
        _image(32),
    ),
    "HunyuanDiT2DModel": (
        {
            **{**SIZES, "in_channels": 4, "patch_size": 2, "sample_size": 16, "hidden_size": 128},
            **{"cross_attention_dim": 64, "cross_attention_dim_t5": 64, "pooled_projection_dim": 64, "text_len": 8},
            **{"text_len_t5": 8, "use_style_cond_and_image_meta_size": False},
        },
        _image(
            4,
            timestep=torch.full((2,), 500.0),
            encoder_hidden_states_t5=_seeded(2, 8, 64),
            text_embedding_mask=torch.ones(2, 8),
            text_embedding_mask_t5=torch.ones(2, 8),
        ),
    ),
    "CogView4Transformer2DModel": (
        {**SIZES, "text_embed_dim": 64, "time_embed_dim": 64, "condition_dim": 32, "rope_axes_dim": (16, 16)},
        _image(16, **{name: torch.full((2, 2), 16.0) for name in ("original_size", "target_size", "crop_coords")}),
    ),
    "Lumina2Transformer2DModel": (
        {
            **{"sample_size": 16, "hidden_size": 128, "num_layers": 2, "num_refiner_layers": 1, "cap_feat_dim": 64},
            **{"num_attention_heads": 4, "num_kv_heads": 2, "axes_dim_rope": (8, 12, 12), "axes_lens": (64, 64, 64)},
        },
        _image(16, encoder_attention_mask=torch.ones(2, 8, dtype=torch.bool)),
    ),
    "OmniGenTransformer2DModel": (
        {
            **{"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 256},
            **{"num_layers": 2, "vocab_size": 128, "pad_token_id": 0, "pos_embed_max_size": 16, "time_step_dim": 64},
            "rope_scaling": {"long_factor": [1.0] * 16, "short_factor": [1.0] * 16, "type": "su"},
        },
        lambda: {
            **{"hidden_states": _seeded(2, 4, 16, 16), "timestep": _steps(), "input_ids": torch.ones(2, 8).long()},
            **{"input_img_latents": [], "input_image_sizes": {}, "attention_mask": torch.ones(2, 73, 73)},
            "position_ids": torch.arange(73).expand(2, 73),
        },
    ),
    "ZImageTransformer2DModel": (
        {
            **{"dim": 128, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": 64},
            **{"axes_dims": [8, 12, 12], "axes_lens": [64, 64, 64]},
        },
        lambda: {"x": [_seeded(16, 1, 16, 16)], "t": torch.tensor([0.5]), "cap_feats": [_seeded(8, 64)]},
    ),
    "CogVideoXTransformer3DModel": (
        {
            **SIZES,
            **{"in_channels": 4, "out_channels": 4, "time_embed_dim": 64, "text_embed_dim": 64, "sample_width": 16},
            **{"sample_height": 16, "sample_frames": 9, "max_text_seq_length": 8},
        },
        _image(3, 4, 16, 16),
    ),
    "WanTransformer3DModel": ({**SIZES, "text_dim": 64, "freq_dim": 64, "ffn_dim": 256}, _image(16, 2, 16, 16)),
    "LTXVideoTransformer3DModel": (
        {**SIZES, "in_channels": 16, "out_channels": 16, "cross_attention_dim": 128, "caption_channels": 64},
        _packed(16, **_mask(), num_frames=1, height=8, width=8),
    ),
    "HunyuanVideoTransformer3DModel": (
        {
            **SIZES,
            **{"num_single_layers": 2, "num_refiner_layers": 1, "in_channels": 4, "out_channels": 4},
            **{"text_embed_dim": 64, "pooled_projection_dim": 64, "rope_axes_dim": (8, 12, 12)},
        },
        _image(4, 2, 16, 16, **_mask(), pooled_projections=_seeded(2, 64), guidance=torch.ones(2)),
    ),
    "MochiTransformer3DModel": (
        {**SIZES, "pooled_projection_dim": 64, "text_embed_dim": 64, "time_embed_dim": 64},
        _image(12, 2, 16, 16, encoder_attention_mask=torch.ones(2, 8, dtype=torch.bool)),
    ),
    "AllegroTransformer3DModel": (
        {**SIZES, "attention_head_dim": 24, "cross_attention_dim": 96, "caption_channels": 64},
        _image(4, 2, 16, 16, encoder_attention_mask=torch.ones(2, 1, 8)),
    ),
    "LatteTransformer3DModel": (
        {
            **{**SIZES, "in_channels": 4, "patch_size": 2, "sample_size": 16, "cross_attention_dim": 128},
            **{"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False},
            **{"activation_fn": "gelu-approximate", "attention_bias": True, "caption_channels": 64, "video_length": 2},
        },
        _image(4, 2, 16, 16),
    ),
    "CosmosTransformer3DModel": (
        {**SIZES, "in_channels": 4, "out_channels": 4, "text_embed_dim": 64, "adaln_lora_dim": 32},
        _image(4, 2, 16, 16, padding_mask=torch.zeros(2, 1, 16, 16), fps=16),
    ),
    "PriorTransformer": (
        {**SIZES, "embedding_dim": 64, "num_embeddings": 8},
        lambda: {
            **{"hidden_states": _seeded(2, 64), "timestep": 500, "proj_embedding": _seeded(2, 64)},
            "encoder_hidden_states": _seeded(2, 8, 64),
        },
    ),
}


def architectures() -> list[str]:
    return sorted(CASES)


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model in evaluation mode with its inputs.

    Raises:
        Unbuilt: diffusers, or this class of it, is not installed.
    """
    try:
        import diffusers
    except ImportError:
        raise Unbuilt("diffusers is not installed") from None
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise Unbuilt(f"diffusers {diffusers.__version__} has no {name}")
    config, inputs = CASES[name]
    torch.manual_seed(0)
    return filled(kind(**config)), (), inputs()
