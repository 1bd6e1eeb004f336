"""Single files with the names of original implementations: loaded as diffusers itself converts them, in FP8.

Not part of the ordinary run: ``pip install diffusers``, then ``pytest tests/around``.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fp8gemm import FP8Linear, FP8Weight, load_checkpoint, save_checkpoint

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("default")

# The order in which original implementations fuse these.
FUSED = ("to_q", "add_q_proj", "to_k", "add_k_proj", "to_v", "add_v_proj", "proj_mlp", "gate_layer", "img_mlp.proj")
MLP = [(r"\bff_context\.net\.0\.proj\.", "txt_mlp.0."), (r"\bff_context\.net\.2\.", "txt_mlp.2.")]
MLP += [(r"\bff\.net\.0\.proj\.", "img_mlp.0."), (r"\bff\.net\.2\.", "img_mlp.2.")]
FINAL = [(r"^proj_out\.", "final_layer.linear."), (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1.")]
BLOCKS = [
    (r"^single_transformer_blocks\.(\d+)\.(attn\.to_[qkv]|proj_mlp)\.", r"single_blocks.\1.linear1."),
    (r"^single_transformer_blocks\.(\d+)\.proj_out\.", r"single_blocks.\1.linear2."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"attn\.to_[qkv]\.", "img_attn.qkv."),
    (r"attn\.add_[qkv]_proj\.", "txt_attn.qkv."),
    (r"attn\.to_out\.0\.", "img_attn.proj."),
    (r"attn\.to_add_out\.", "txt_attn.proj."),
    (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
    (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
    (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
    (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
    (r"^context_embedder\.", "txt_in."),
    (r"^x_embedder\.", "img_in."),
]


def embedders(prefix: str, names: Mapping[str, str], first: str, second: str) -> list[tuple[str, str]]:
    return [
        (rf"^{prefix}\.{new}\.linear_{number}\.", f"{old}.{end}.")
        for new, old in names.items()
        for number, end in ((1, first), (2, second))
    ]


@dataclass(frozen=True, kw_only=True)
class Family:
    """``inverse`` leads from the names of a model to those of the original. ``sizes`` replace constants of diffusers'
    conversion, which are the sizes of the published models, by those of this one."""

    model: Callable[[], Any]
    convert: str
    inverse: list[tuple[str, str]]
    sizes: Mapping[int, int] = field(default_factory=dict)
    more: tuple[str, ...] = ()  # original tensors that no model has


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=[8, 12, 12],
        guidance_embeds=True,
    )


def chroma() -> Any:
    return diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        axes_dims_rope=(8, 12, 12),
        approximator_num_channels=16,
        approximator_hidden_dim=64,
        approximator_layers=2,
    )


def flux2() -> Any:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        timestep_guidance_channels=64,
        axes_dims_rope=[8, 8, 8, 8],
    )


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=128,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def wan() -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=64,
        ffn_dim=256,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        image_dim=64,
        added_kv_proj_dim=128,
    )


def wan_vace() -> Any:
    return diffusers.WanVACETransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=64,
        ffn_dim=256,
        num_layers=2,
        rope_max_seq_len=32,
        vace_layers=[0, 1],
        vace_in_channels=12,
    )


def z_image() -> Any:
    return diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=128,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=64,
        axes_dims=[8, 12, 12],
        axes_lens=[64, 64, 64],
    )


def lumina2() -> Any:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=96,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(8, 8, 8),
        cap_feat_dim=64,
    )


def ltx() -> Any:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=32,
        cross_attention_dim=128,
        num_layers=2,
        caption_channels=64,
    )


def ltx2() -> Any:
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=32,
        cross_attention_dim=128,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=4,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=64,
        num_layers=2,
        caption_channels=64,
    )


def hunyuan() -> Any:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=64,
        pooled_projection_dim=64,
        rope_axes_dim=(8, 12, 12),
    )


def qwen_image_21() -> Any:
    return diffusers.QwenImage21Transformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=4,
        context_in_dim=64,
        axes_dims_rope=(8, 12, 12),
    )


SD3 = [
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    *embedders("time_text_embed", {"timestep_embedder": "t_embedder", "text_embedder": "y_embedder"}, "mlp.0", "mlp.2"),
    (r"^transformer_blocks\.", "joint_blocks."),
    (r"norm1\.linear\.", "x_block.adaLN_modulation.1."),
    (r"norm1_context\.linear\.", "context_block.adaLN_modulation.1."),
    (r"ff_context\.net\.0\.proj\.", "context_block.mlp.fc1."),
    (r"ff_context\.net\.2\.", "context_block.mlp.fc2."),
    (r"ff\.net\.0\.proj\.", "x_block.mlp.fc1."),
    (r"ff\.net\.2\.", "x_block.mlp.fc2."),
    (r"(attn2?)\.to_[qkv]\.", r"x_block.\1.qkv."),
    (r"(attn2?)\.to_out\.0\.", r"x_block.\1.proj."),
    (r"(attn2?)\.norm_([qk])\.", r"x_block.\1.ln_\2."),
    (r"attn\.add_[qkv]_proj\.", "context_block.attn.qkv."),
    (r"attn\.to_add_out\.", "context_block.attn.proj."),
    (r"attn\.norm_added_([qk])\.", r"context_block.attn.ln_\1."),
    *FINAL,
]
WAN = [
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"attn1", "self_attn"),
    (r"attn2", "cross_attn"),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table", ".modulation"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    (r"(blocks\.\d+)\.norm2", r"\1.norm3"),
]
HUNYUAN = [
    (r"^context_embedder\.proj_in", "txt_in.input_embedder"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1", "txt_in.t_embedder.mlp.0"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2", "txt_in.t_embedder.mlp.2"),
    (r"^context_embedder\.time_text_embed\.text_embedder", "txt_in.c_embedder"),
    (r"^context_embedder\.token_refiner\.refiner_blocks", "txt_in.individual_token_refiner.blocks"),
    (r"(^txt_in.*)\.attn\.to_[qkv]\.", r"\1.self_attn_qkv."),
    (r"(^txt_in.*)\.attn\.to_out\.0\.", r"\1.self_attn_proj."),
    (r"(^txt_in.*)\.norm_out\.linear\.", r"\1.adaLN_modulation.1."),
    (r"(^txt_in.*)\.ff\.net\.0\.proj\.", r"\1.mlp.fc1."),
    (r"(^txt_in.*)\.ff\.net\.2\.", r"\1.mlp.fc2."),
    *embedders(
        "time_text_embed", {"timestep_embedder": "time_in", "guidance_embedder": "guidance_in"}, "mlp.0", "mlp.2"
    ),
    *embedders("time_text_embed", {"text_embedder": "vector_in"}, "in_layer", "out_layer"),
    (r"^(single_transformer_blocks.*)\.attn\.norm_([qk])\.weight", r"\1.\2_norm.weight"),
    *BLOCKS,
    (r"_attn\.norm\.query_norm\.scale", "_attn_q_norm.weight"),
    (r"_attn\.norm\.key_norm\.scale", "_attn_k_norm.weight"),
    (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
    (r"norm1\.linear", "img_mod.linear"),
    (r"norm1_context\.linear", "txt_mod.linear"),
    (r"\.norm\.linear", ".modulation.linear"),
    (r"\bff_context\.net\.0\.proj\.", "txt_mlp.fc1."),
    (r"\bff_context\.net\.2\.", "txt_mlp.fc2."),
    (r"\bff\.net\.0\.proj\.", "img_mlp.fc1."),
    (r"\bff\.net\.2\.", "img_mlp.fc2."),
    *FINAL,
]
LTX2 = [
    (r"^audio_proj_in", "audio_patchify_proj"),
    (r"^proj_in", "patchify_proj"),
    (r"^time_embed\.", "adaln_single."),
    (r"^audio_time_embed\.", "audio_adaln_single."),
    (r"^av_cross_attn_video_scale_shift\.", "av_ca_video_scale_shift_adaln_single."),
    (r"^av_cross_attn_video_a2v_gate\.", "av_ca_a2v_gate_adaln_single."),
    (r"^av_cross_attn_audio_scale_shift\.", "av_ca_audio_scale_shift_adaln_single."),
    (r"^av_cross_attn_audio_v2a_gate\.", "av_ca_v2a_gate_adaln_single."),
    (r"\.(video|audio)_a2v_cross_attn_scale_shift_table", r".scale_shift_table_a2v_ca_\1"),
    (r"norm_([qk])\.", r"\1_norm."),
]
LUMINA2 = [
    (r"^norm_out\.linear_1", "final_layer.adaLN_modulation.1"),
    (r"^norm_out\.linear_2", "final_layer.linear"),
    (r"(?<=context_refiner\.\d\.)norm([12])", r"attention_norm\1"),
    (r"norm1\.norm", "attention_norm1"),
    (r"\.norm2\.", ".attention_norm2."),
    (r"norm1\.linear", "adaLN_modulation.1"),
    (r"^time_caption_embed\.caption_embedder", "cap_embedder"),
    (r"^time_caption_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_caption_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"attn\.to_[qkv]\.", "attention.qkv."),
    (r"attn\.to_out\.0\.", "attention.out."),
    (r"attn\.norm_([qk])", r"attention.\1_norm"),
    (r"feed_forward\.linear_([123])", r"feed_forward.w\1"),
]
Z_IMAGE = [
    (r"^all_final_layer\.2-1\.", "final_layer."),
    (r"^all_x_embedder\.2-1\.", "x_embedder."),
    (r"attention\.to_[qkv]\.", "attention.qkv."),
    (r"attention\.to_out\.0\.", "attention.out."),
    (r"attention\.norm_([qk])\.", r"attention.\1_norm."),
]
FLUX2 = [
    (r"attn\.to_qkv_mlp_proj\.", "linear1."),
    (r"^(single_transformer_blocks.*)\.attn\.to_out\.", r"\1.linear2."),
    *BLOCKS,
    *embedders(
        "time_guidance_embed",
        {"timestep_embedder": "time_in", "guidance_embedder": "guidance_in"},
        "in_layer",
        "out_layer",
    ),
    (r"(_modulation(_img|_txt)?)\.linear\.", r"\1.lin."),
    (r"ff\.linear_in\.", "img_mlp.0."),
    (r"ff\.linear_out\.", "img_mlp.2."),
    (r"ff_context\.linear_in\.", "txt_mlp.0."),
    (r"ff_context\.linear_out\.", "txt_mlp.2."),
    *FINAL,
]
FLUX = [
    *embedders(
        "time_text_embed",
        {"timestep_embedder": "time_in", "guidance_embedder": "guidance_in", "text_embedder": "vector_in"},
        "in_layer",
        "out_layer",
    ),
    *BLOCKS,
    *MLP,
    (r"norm1\.linear", "img_mod.lin"),
    (r"norm1_context\.linear", "txt_mod.lin"),
    (r"\.norm\.linear", ".modulation.lin"),
    *FINAL,
]
CHROMA = [
    (r"(distilled_guidance_layer\..*)linear_1", r"\1in_layer"),
    (r"(distilled_guidance_layer\..*)linear_2", r"\1out_layer"),
    (r"(distilled_guidance_layer\.norms\.\d+)\.weight", r"\1.scale"),
    *BLOCKS,
    *MLP,
    *FINAL,
]
FAMILIES = {
    "flux": Family(model=flux, convert="convert_flux_transformer_checkpoint", inverse=FLUX, sizes={3072: 128}),
    "chroma": Family(model=chroma, convert="convert_chroma_transformer_checkpoint", inverse=CHROMA, sizes={3072: 128}),
    "flux2": Family(model=flux2, convert="convert_flux2_transformer_checkpoint", inverse=FLUX2),
    "sd3": Family(
        model=sd3,
        convert="convert_sd3_transformer_checkpoint",
        inverse=SD3,
    ),
    "wan": Family(model=wan, convert="convert_wan_transformer", inverse=WAN),
    "wan-vace": Family(
        model=wan_vace,
        convert="convert_wan_transformer",
        inverse=[
            *WAN,
            (r"^(vace_blocks\.\d+)\.proj_in\.", r"\1.before_proj."),
            (r"^(vace_blocks\.\d+)\.proj_out\.", r"\1.after_proj."),
        ],
    ),
    "z-image": Family(
        model=z_image,
        convert="convert_z_image_transformer_checkpoint",
        inverse=Z_IMAGE,
        more=("norm_final.weight",),
    ),
    "lumina2": Family(
        model=lumina2,
        convert="convert_lumina2",
        inverse=LUMINA2,
        sizes={2304: 96, 768: 48},
        more=("norm_final.weight",),
    ),
    "ltx": Family(model=ltx, convert="convert_ltx_transformer_checkpoint", inverse=LTX2),
    "ltx2": Family(
        model=ltx2,
        convert="convert_ltx2_transformer",
        inverse=LTX2,
        more=("video_embeddings_connector.learnable_registers",),
    ),
    "hunyuan-video": Family(
        model=hunyuan, convert="convert_hunyuan_video_transformer", inverse=HUNYUAN, sizes={3072: 128}
    ),
    "qwen-image-2.1": Family(
        model=qwen_image_21,
        convert="convert_qwen_image21_transformer_checkpoint",
        inverse=[(r"img_mlp\.(gate_layer|proj)\.", "img_mlp.gate_up.")],
    ),
}


def converted(family: Family, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' own conversion, with its constants replaced."""
    from diffusers.loaders import single_file_utils

    def sized(code: types.CodeType) -> types.CodeType:
        constants = (
            sized(one)
            if isinstance(one, types.CodeType)
            else family.sizes.get(one, one)
            if isinstance(one, int)
            else one
            for one in code.co_consts
        )
        return code.replace(co_consts=tuple(constants))

    own = getattr(single_file_utils, f"{family.convert}_to_diffusers")
    function = types.FunctionType(sized(own.__code__), own.__globals__)
    return dict(function(dict(state)))


def original(family: Family, model: Any) -> dict[str, torch.Tensor]:
    """Random values under the names of the original implementation, for all tensors of a model."""
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        old = name
        for pattern, replacement in family.inverse:
            old = re.sub(pattern, replacement, old)
        order = next((index for index, part in enumerate(FUSED) if f".{part}." in name), 0)
        found = parts.setdefault(old, {})
        assert order not in found, name
        found[order] = tuple(tensor.shape)
    shapes = {
        name: (sum(one[0] for one in found.values()), *next(iter(found.values()))[1:]) for name, found in parts.items()
    }
    shapes.update(dict.fromkeys(family.more, (64,)))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def quantized(state: Mapping[str, torch.Tensor], rows: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A file with FP8 weights in the blocks, and its values."""
    stored, values = {}, {}
    for name, tensor in state.items():
        stored[name] = values[name] = tensor
        if name.endswith(".weight") and tensor.dim() == 2 and re.search(r"\.\d+\.|final_layer", name):
            scale = (tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().amax()) / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "scale_weight"] = scale
            values[name] = stored[name].to(torch.float32) * scale
    return {**stored, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, values


@pytest.mark.parametrize("rows", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fp8_files_load_as_diffusers_converts_them(name: str, rows: bool, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    stored, values = quantized(original(family, model), rows)
    prefix = "model.diffusion_model." if rows else ""
    save_file(
        {prefix * (key != "scaled_fp8") + key: one for key, one in stored.items()}, tmp_path / "model.safetensors"
    )
    names = set(model.state_dict())
    report = load_checkpoint(model, tmp_path / "model.safetensors")
    assert sorted(report.unexpected) == sorted(family.more)
    wanted = converted(family, values)
    assert wanted.keys() >= names
    assert len([one for one in model.modules() if isinstance(one, FP8Linear)]) > 5
    for key, tensor in model.named_parameters():
        got = tensor.dequantize() if isinstance(tensor, FP8Weight) else tensor
        assert torch.equal(got, wanted[key]), key
    for key, tensor in model.named_buffers():
        if key in wanted:
            assert torch.equal(tensor, wanted[key]), key


def test_raw_casts_of_everything(tmp_path: Path) -> None:
    """As ComfyUI publishes Flux: biases and norms are FP8, too, and there are no scales."""
    family, model = FAMILIES["flux"], flux()
    stored = {name: one.to(torch.float8_e4m3fn) for name, one in original(family, model).items()}
    save_file(stored, tmp_path / "flux1-dev-fp8.safetensors")
    load_checkpoint(model, tmp_path / "flux1-dev-fp8.safetensors")
    wanted = converted(family, {name: one.to(torch.float32) for name, one in stored.items()})
    assert type(model.single_transformer_blocks[0].proj_mlp) is FP8Linear
    for key, tensor in model.named_parameters():
        got = tensor.dequantize() if isinstance(tensor, FP8Weight) else tensor
        assert torch.equal(got, wanted[key]), key


def comfy(name: str) -> str:
    """ComfyUI's name of a tensor of HunyuanVideo, as its ``process_unet_state_dict`` makes it."""
    for end, new in ((0, "in"), (2, "out")):
        name = re.sub(rf"((time|guidance)_in|txt_in\.t_embedder)\.mlp\.{end}\.", rf"\1.{new}_layer.", name)
    name = name.replace("c_embedder.linear_1.", "c_embedder.in_layer.").replace(
        "c_embedder.linear_2.", "c_embedder.out_layer."
    )
    name = (
        name.replace("_mod.linear.", "_mod.lin.")
        .replace("_attn_qkv.", "_attn.qkv.")
        .replace("_attn_proj.", "_attn.proj.")
    )
    name = (
        name.replace("mlp.fc1.", "mlp.0.")
        .replace("mlp.fc2.", "mlp.2.")
        .replace(".modulation.linear.", ".modulation.lin.")
    )
    name = name.replace("_attn_q_norm.weight", "_attn.norm.query_norm.scale")
    name = name.replace("_attn_k_norm.weight", "_attn.norm.key_norm.scale")
    name = name.replace(".q_norm.weight", ".norm.query_norm.scale").replace(".k_norm.weight", ".norm.key_norm.scale")
    return f"model.model.{name}"


def test_the_names_that_comfyui_gives_hunyuan_video(tmp_path: Path) -> None:
    family, model, again = FAMILIES["hunyuan-video"], hunyuan(), hunyuan()
    stored, _ = quantized(original(family, model), rows=True)
    for target, rename in ((model, str), (again, comfy)):
        save_file(
            {rename(name): one for name, one in stored.items() if name != "scaled_fp8"}, tmp_path / "model.safetensors"
        )
        load_checkpoint(target, tmp_path / "model.safetensors")
    for (name, first), second in zip(model.named_parameters(), again.parameters(), strict=True):
        values = [one.dequantize() if isinstance(one, FP8Weight) else one for one in (first, second)]
        assert torch.equal(*values), name


def test_files_with_the_names_of_diffusers_load_as_before(tmp_path: Path) -> None:
    model = wan()
    stored, values = quantized({name: tensor.clone() for name, tensor in model.state_dict().items()}, rows=True)
    save_file(stored, tmp_path / "model.safetensors")
    load_checkpoint(model, tmp_path / "model.safetensors")
    assert torch.equal(model.blocks[1].norm2.weight, values["blocks.1.norm2.weight"])
    assert torch.equal(model.blocks[1].attn2.to_q.weight.dequantize(), values["blocks.1.attn2.to_q.weight"])


def test_models_are_saved_under_their_own_names(tmp_path: Path) -> None:
    model = flux()
    stored, _ = quantized(original(FAMILIES["flux"], model), rows=False)
    save_file(stored, tmp_path / "flux.safetensors")
    load_checkpoint(model, tmp_path / "flux.safetensors")
    save_checkpoint(model, tmp_path / "saved")
    again = flux()
    load_checkpoint(again, tmp_path / "saved")
    for (name, first), second in zip(model.named_parameters(), again.parameters(), strict=True):
        assert type(first) is type(second), name
        values = [one.dequantize() if isinstance(one, FP8Weight) else one for one in (first, second)]
        assert torch.equal(*values), name
