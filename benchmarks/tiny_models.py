"""A small random model of every transformers architecture, and inputs for it, made without specific knowledge of any.

A configuration is shrunk by the names of its numbers, a model class is taken from transformers' own tables, and inputs
are those that its forward names. Architectures that need more than that are skipped, with the reason.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

VOCABULARY, WIDTH, LAYERS, HEADS, LARGEST = 512, 128, 2, 4, 60_000_000
ORDINARY = range(20, 400)  # token ids without special meaning; special ids are above or below

# The new values of integers in a configuration, if they are larger: the first pattern that matches the whole name.
SMALLER: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|codebook_size", VOCABULARY),
    (r".*(experts_per_tok(en)?|moe_top_?k|moe_topk|num_selected_experts)|top_k", 2),
    (r"(.*_)?(num|n)_(routed_|local_)?experts|moe_num_experts", 4),
    (r"rotary_dim", WIDTH // HEADS),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r"first_k_dense_replace|moe_layer_start_index", 1),
    (r"num_mtp_layers|num_nextn_predict_layers", 0),
    (r"(.*_)?(num_(key_value|kv)_heads|multi_query_group_num)", 2),
    (r"(.*_)?(attention_heads|n_heads?|num_heads|num_key_heads|num_value_heads|attn_heads)", HEADS),
    (r"(.*_)?(head_dim|head_size|d_kv)|.*_head_dim|kv_channels", WIDTH // HEADS),
    (r"(.*_)?(layers?|n_layer|depth|num_blocks|num_encoder_blocks|num_layers_.*)|num_hidden_layers.*", LAYERS),
    (r".*lora_rank|.*_rank", WIDTH // 2),
    (r".*(intermediate_size|intermediate_dim|ffn_dim|mlp_dim|d_ff|n_inner|ffn_hidden_size|dim_feedforward)", 2 * WIDTH),
    (r".*(feed_forward_dim|mlp_hidden_dim|ffn_size|mlp_hidden_size)", 2 * WIDTH),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|projection_dim|hidden_dim|embedding_dim)", WIDTH),
    (r"(.*_)?(dim|emb_dim|model_dim|d_embed|width|proj_size|projection_size|embd_dim|hidden_channels)", WIDTH),
    (r"image_size|input_size|img_size", 64),
    (r"max_position_embeddings|n_positions|max_seq_len|max_source_positions|max_target_positions", 128),
    (r"num_queries|num_query_tokens|resampler_n_latents|num_latents", 16),
    (r".*index_topk|sliding_window", 16),
    (r"num_frames", 4),
)
FLOATS = {"initializer_range": 0.09, "init_std": 0.09, "initializer_factor": 1.0, "layer_scale_init_value": 0.5}
# What the names do not determine.
ESPECIALLY: dict[str, dict[str, Any]] = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 16, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 8, "head_dim": 32, "expand": 2, "chunk_size": 16},
    "reformer": {
        **{"axial_pos_embds": False, "num_buckets": 4, "attn_layers": ["local", "local"], "is_decoder": False},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "nemotron": {"num_key_value_heads": 2},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
}
TABLES = (
    *("MASKED_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "CTC"),
    *("ZERO_SHOT_IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "DEPTH_ESTIMATION"),
    *("IMAGE_CLASSIFICATION", "PRETRAINING", "TIME_SERIES_PREDICTION", "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM"),
)


class Unbuilt(Exception):
    """The reason why there is no small model of an architecture."""


def architectures() -> list[str]:
    """All model types with a model class, in alphabetical order; none if transformers is not installed."""
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return []
    tables = [table for key, table in vars(modeling_auto).items() if _is_table(key)]
    return sorted(set(modeling_auto.CONFIG_MAPPING_NAMES) & {name for table in tables for name in table})


def _is_table(key: str) -> bool:
    return key.startswith("MODEL_") and key.endswith("MAPPING_NAMES")


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model of an architecture in evaluation mode, with positional and keyword inputs on which it runs.

    Raises:
        Unbuilt: none of its classes could be made and run, with the reason for each.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    reasons = []
    kind = CONFIG_MAPPING[name]
    for width, tied in ((True, True), (True, False), (False, True)):
        try:
            config = shrunk(kind, name, width=width, tied=tied)
        except Exception as error:
            reasons.append(f"configuration: {told(error)}")
            continue
        for model_kind in classes(name)[:2]:
            try:
                model = made(model_kind, config)
            except Exception as error:
                reasons.append(f"{model_kind.__name__}: {told(error)}")
                continue
            for inputs in inputs_of(model, config):
                try:
                    torch.manual_seed(0)
                    with torch.no_grad():
                        model(**inputs)
                except Exception as error:
                    reasons.append(f"{model_kind.__name__}({', '.join(inputs)}): {told(error)}")
                else:
                    return model, (), inputs
    raise Unbuilt("; ".join(dict.fromkeys(reasons)) or "transformers has no model class for it")


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:150]


# --- configurations --------------------------------------------------------------------------------------------------


def shrunk(kind: type, name: str = "", *, width: bool = True, tied: bool = True) -> Any:
    """A small configuration of a class; with its own width and heads if ``width`` is false. ``tied`` ties heads."""
    first = kind()
    values: dict[str, Any] = {}
    layers = next((value for key, value in vars(first).items() if key.endswith(("hidden_layers", "n_layer"))), None)
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    for key in fields - {"transformers_version", "architectures"}:
        value = vars(first).get(key)
        if value is None and width and key == "head_dim":
            values[key] = WIDTH // HEADS
        if value is None or callable(value):
            continue
        smaller = _smaller(key, value, layers, width=width, tied=tied)
        if smaller is not value and smaller != value:
            values[key] = smaller
    values.update({key: value for key, value in ESPECIALLY.get(name, {}).items() if key in fields})
    if "kv_lora_rank" in fields and "num_key_value_heads" in values:
        values["num_key_value_heads"] = HEADS  # latent attention has a key for each head
    if tied and "tie_word_embeddings" in fields:
        values["tie_word_embeddings"] = True
    return kind(**values)


def _smaller(key: str, value: Any, layers: Any, *, width: bool, tied: bool) -> Any:
    if hasattr(value, "to_dict") and hasattr(value, "model_type"):
        return shrunk(type(value), value.model_type, width=width, tied=tied)
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, int) and re.fullmatch(r".*(token_id|token_index|_id|_idx|_index)", key):
        return value if value < ORDINARY.start else ORDINARY.stop + sum(map(ord, key)) % (VOCABULARY - ORDINARY.stop)
    if isinstance(value, int):
        for pattern, most in SMALLER:
            if re.fullmatch(pattern, key):
                return min(value, most) if width or most in (VOCABULARY, LAYERS, 0) else value
    if isinstance(value, float):
        return FLOATS.get(key, value)
    if isinstance(value, (list, tuple)) and value:
        if len(value) == layers and layers > LAYERS:
            return type(value)(_ends(list(value)))
        if key in ("depths", "layer_depths") and all(isinstance(one, int) for one in value):
            return type(value)(min(one, 2) for one in value)
    return value


def _ends(values: list[Any]) -> list[Any]:
    """The values of as many layers as the model will have, of different kinds if possible."""
    other = next((value for value in values if value != values[0]), values[-1])
    return [*values[: LAYERS - 1], other]


# --- models ----------------------------------------------------------------------------------------------------------


def classes(name: str) -> list[Any]:
    """The model classes of an architecture, those with a head first."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    tables = [getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES") for table in TABLES]
    tables.append(modeling_auto.MODEL_MAPPING_NAMES)
    rest = [table for key, table in vars(modeling_auto).items() if _is_table(key)]
    found: dict[str, None] = {}
    for table in (*tables, *rest):
        entry = table.get(name)
        for one in (entry,) if isinstance(entry, str) else entry or ():
            found[one] = None
    module = importlib.import_module(f"transformers.models.{model_type_to_module_name(name)}")
    return [getattr(module, one) for one in found if hasattr(module, one)]


def made(kind: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise Unbuilt(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return filled(kind(config))


def filled(model: nn.Module) -> Any:
    """Puts ordinary values where the initialization leaves whole matrices at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


# --- inputs ----------------------------------------------------------------------------------------------------------


def inputs_of(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Inputs to try, one after the other."""
    taken = inspect.signature(model.forward).parameters
    main = str(getattr(model, "main_input_name", "input_ids"))
    names = [name for name in MAKERS if name in taken and not (name == "inputs_embeds" and "input_ids" in taken)]
    required = [name for name, one in taken.items() if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    texts = [name for name in names if name in ("input_ids", "decoder_input_ids", "bbox")]
    least = [name for name in dict.fromkeys((main, *required)) if name in MAKERS]
    wishes = [names, [*texts, "pixel_values"], list(dict.fromkeys((*least, *texts))), texts, least]
    tried = []
    for wish in wishes:
        wish = [name for name in wish if name in taken]
        if not wish or wish in tried:
            continue
        tried.append(wish)
        for variant in range(max(len(MAKERS[name]) for name in wish)):
            try:
                made = {name: MAKERS[name][min(variant, len(MAKERS[name]) - 1)](config) for name in wish}
            except (AttributeError, TypeError):  # the configuration lacks what such an input is made from
                continue
            yield {**made, "use_cache": False} if "use_cache" in taken else made


def _seeded(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


def _ids(config: Any) -> torch.Tensor:
    return torch.randint(ORDINARY.start, ORDINARY.stop, (2, 16), generator=torch.Generator().manual_seed(1))


def number(config: Any, *names: str, default: int | None = None) -> int:
    """The first of some numbers that a configuration or one of its parts has."""
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "model_type"))]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    if default is None:
        raise AttributeError(f"none of {names}")
    return default


def _channels(config: Any) -> int:
    return number(config, "num_channels", "in_channels", "num_image_channels", "in_chans", default=3)


def _image(config: Any) -> torch.Tensor:
    size = number(config, "image_size", "img_size", "input_size", default=64)
    return _seeded(2, _channels(config), size, size)


def _large_image(config: Any) -> torch.Tensor:
    return _seeded(1, _channels(config), 224, 224)


def _video(config: Any) -> torch.Tensor:
    size = number(config, "image_size", "img_size", "crop_size", default=64)
    return _seeded(1, number(config, "num_frames", "frames_per_clip", default=4), _channels(config), size, size)


def _patches(config: Any) -> torch.Tensor:
    """Patches of an image of 8 x 8 patches, as the vision towers of Qwen models take them."""
    patch = number(config, "patch_size")
    return _seeded(64, _channels(config) * number(config, "temporal_patch_size", default=1) * patch * patch)


def _mels(config: Any) -> int:
    return number(config, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "mel_bins")


def _frames(config: Any) -> int:
    return 2 * number(config, "max_source_positions", default=64)


def _states(config: Any) -> torch.Tensor:
    return _seeded(2, 16, number(config, "hidden_size", "d_model", "embed_dim"))


def _past(config: Any) -> torch.Tensor:
    return _seeded(2, number(config, "context_length"), number(config, "num_input_channels", default=1))


MAKERS: dict[str, tuple[Any, ...]] = {
    "input_ids": (_ids,),
    "decoder_input_ids": (_ids,),
    "bbox": (lambda config: torch.arange(4).expand(2, 16, 4) * 10,),
    "pixel_values": (_image, _large_image, _video, _patches),
    "pixel_values_videos": (_video,),
    "grid_thw": (lambda config: torch.tensor([[1, 8, 8]]),),
    "image_grid_thw": (lambda config: torch.tensor([[1, 8, 8]]),),
    "input_values": (
        lambda config: _seeded(2, 8000),
        lambda config: _seeded(2, 1, 8000),
        lambda config: _seeded(2, number(config, "max_length"), _mels(config)),
    ),
    "input_features": (
        lambda config: _seeded(2, _mels(config), _frames(config)),
        lambda config: _seeded(2, _frames(config), _mels(config)),
    ),
    "hidden_states": (_states, _patches),
    "inputs_embeds": (_states,),
    "past_values": (_past, lambda config: _past(config)[..., 0]),
}
