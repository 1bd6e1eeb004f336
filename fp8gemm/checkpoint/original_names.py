"""The names of original implementations for diffusers' models: tables of what is renamed, split, swapped or left out.

Each is equivalent to diffusers' own conversion of the same files (``diffusers.loaders.single_file_utils``). Rows apply
in order, to what those before them made. A key is literal text, tied to the start of the name by a leading ``^`` and to
the end by a closing ``$``; ``{last}`` is the number of the last transformer block.
"""

from __future__ import annotations

from collections.abc import Mapping

from .renaming import KeyMapping, Split, Swap

_PREFIX: KeyMapping = {"^model.diffusion_model.": "", "^diffusion_model.": ""}
_QKV = Split((".attn.to_q.", ".attn.to_k.", ".attn.to_v."))
_ADDED_QKV = Split((".attn.add_q_proj.", ".attn.add_k_proj.", ".attn.add_v_proj."))
_QKV_MLP = Split((".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".proj_mlp."))

_FLUX_ATTENTION: KeyMapping = {
    **_PREFIX,
    "^double_blocks.": "transformer_blocks.",
    "^single_blocks.": "single_transformer_blocks.",
    ".img_attn.qkv.": _QKV,
    ".txt_attn.qkv.": _ADDED_QKV,
    "_norm.scale": "_norm.weight",
    ".img_attn.norm.query_norm.": ".attn.norm_q.",
    ".img_attn.norm.key_norm.": ".attn.norm_k.",
    ".txt_attn.norm.query_norm.": ".attn.norm_added_q.",
    ".txt_attn.norm.key_norm.": ".attn.norm_added_k.",
    ".norm.query_norm.": ".attn.norm_q.",
    ".norm.key_norm.": ".attn.norm_k.",
    ".img_attn.proj.": ".attn.to_out.0.",
    ".txt_attn.proj.": ".attn.to_add_out.",
    "^img_in.": "x_embedder.",
    "^txt_in.": "context_embedder.",
    "^final_layer.linear.": "proj_out.",
    "^final_layer.adaLN_modulation.1.": Swap("norm_out.linear."),
}

_FLUX_FEED_FORWARD: KeyMapping = {
    ".img_mlp.0.": ".ff.net.0.proj.",
    ".img_mlp.2.": ".ff.net.2.",
    ".txt_mlp.0.": ".ff_context.net.0.proj.",
    ".txt_mlp.2.": ".ff_context.net.2.",
    ".linear1.": _QKV_MLP,
    ".linear2.": ".proj_out.",
}

_FLUX: KeyMapping = {
    **_FLUX_ATTENTION,
    **_FLUX_FEED_FORWARD,
    "^time_in.in_layer.": "time_text_embed.timestep_embedder.linear_1.",
    "^time_in.out_layer.": "time_text_embed.timestep_embedder.linear_2.",
    "^vector_in.in_layer.": "time_text_embed.text_embedder.linear_1.",
    "^vector_in.out_layer.": "time_text_embed.text_embedder.linear_2.",
    "^guidance_in.in_layer.": "time_text_embed.guidance_embedder.linear_1.",
    "^guidance_in.out_layer.": "time_text_embed.guidance_embedder.linear_2.",
    ".img_mod.lin.": ".norm1.linear.",
    ".txt_mod.lin.": ".norm1_context.linear.",
    ".modulation.lin.": ".norm.linear.",
}

_CHROMA: KeyMapping = {
    **_FLUX_ATTENTION,
    **_FLUX_FEED_FORWARD,
    ".in_layer.": ".linear_1.",
    ".out_layer.": ".linear_2.",
    ".scale": ".weight",
}

_FLUX2: KeyMapping = {
    **_FLUX_ATTENTION,
    ".img_mlp.0.": ".ff.linear_in.",
    ".img_mlp.2.": ".ff.linear_out.",
    ".txt_mlp.0.": ".ff_context.linear_in.",
    ".txt_mlp.2.": ".ff_context.linear_out.",
    ".linear1.": ".attn.to_qkv_mlp_proj.",
    ".linear2.": ".attn.to_out.",
    "^time_in.in_layer.": "time_guidance_embed.timestep_embedder.linear_1.",
    "^time_in.out_layer.": "time_guidance_embed.timestep_embedder.linear_2.",
    "^guidance_in.in_layer.": "time_guidance_embed.guidance_embedder.linear_1.",
    "^guidance_in.out_layer.": "time_guidance_embed.guidance_embedder.linear_2.",
    "_modulation_img.lin.": "_modulation_img.linear.",
    "_modulation_txt.lin.": "_modulation_txt.linear.",
    "^single_stream_modulation.lin.": "single_stream_modulation.linear.",
}

_SD3: KeyMapping = {
    **_PREFIX,
    "^pos_embed$": "pos_embed.pos_embed",
    "^x_embedder.proj.": "pos_embed.proj.",
    "^t_embedder.mlp.0.": "time_text_embed.timestep_embedder.linear_1.",
    "^t_embedder.mlp.2.": "time_text_embed.timestep_embedder.linear_2.",
    "^y_embedder.mlp.0.": "time_text_embed.text_embedder.linear_1.",
    "^y_embedder.mlp.2.": "time_text_embed.text_embedder.linear_2.",
    "^joint_blocks.": "transformer_blocks.",
    ".x_block.attn.qkv.": _QKV,
    ".context_block.attn.qkv.": _ADDED_QKV,
    ".x_block.attn2.qkv.": Split((".attn2.to_q.", ".attn2.to_k.", ".attn2.to_v.")),
    ".x_block.attn.ln_q.": ".attn.norm_q.",
    ".x_block.attn.ln_k.": ".attn.norm_k.",
    ".x_block.attn2.ln_q.": ".attn2.norm_q.",
    ".x_block.attn2.ln_k.": ".attn2.norm_k.",
    ".context_block.attn.ln_q.": ".attn.norm_added_q.",
    ".context_block.attn.ln_k.": ".attn.norm_added_k.",
    ".x_block.attn.proj.": ".attn.to_out.0.",
    ".x_block.attn2.proj.": ".attn2.to_out.0.",
    ".context_block.attn.proj.": ".attn.to_add_out.",
    ".x_block.mlp.fc1.": ".ff.net.0.proj.",
    ".x_block.mlp.fc2.": ".ff.net.2.",
    ".context_block.mlp.fc1.": ".ff_context.net.0.proj.",
    ".context_block.mlp.fc2.": ".ff_context.net.2.",
    ".x_block.adaLN_modulation.1.": ".norm1.linear.",
    # The context of the last block is not used further: its norm only has a shift and a scale.
    ".{last}.context_block.adaLN_modulation.1.": Swap(".{last}.norm1_context.linear."),
    ".context_block.adaLN_modulation.1.": ".norm1_context.linear.",
    "^final_layer.linear.": "proj_out.",
    "^final_layer.adaLN_modulation.1.": Swap("norm_out.linear."),
}

_WAN: KeyMapping = {
    **_PREFIX,
    "^time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "^time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "^text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "^text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "^time_projection.1.": "condition_embedder.time_proj.",
    ".cross_attn.": ".attn2.",
    ".self_attn.": ".attn1.",
    ".o.": ".to_out.0.",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".k_img.": ".add_k_proj.",
    ".v_img.": ".add_v_proj.",
    ".norm_k_img.": ".norm_added_k.",
    "^head.modulation": "scale_shift_table",
    "^head.head.": "proj_out.",
    ".modulation": ".scale_shift_table",
    ".ffn.0.": ".ffn.net.0.proj.",
    ".ffn.2.": ".ffn.net.2.",
    ".norm2.": ".norm_third.",
    ".norm3.": ".norm2.",
    ".norm_third.": ".norm3.",
    "^img_emb.proj.0.": "condition_embedder.image_embedder.norm1.",
    "^img_emb.proj.1.": "condition_embedder.image_embedder.ff.net.0.proj.",
    "^img_emb.proj.3.": "condition_embedder.image_embedder.ff.net.2.",
    "^img_emb.proj.4.": "condition_embedder.image_embedder.norm2.",
    "^img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    ".before_proj.": ".proj_in.",
    ".after_proj.": ".proj_out.",
}

_Z_IMAGE: KeyMapping = {
    **_PREFIX,
    "^final_layer.": "all_final_layer.2-1.",
    "^x_embedder.": "all_x_embedder.2-1.",
    ".attention.out.": ".attention.to_out.0.",
    ".attention.q_norm.": ".attention.norm_q.",
    ".attention.k_norm.": ".attention.norm_k.",
    ".attention.qkv.": Split((".attention.to_q.", ".attention.to_k.", ".attention.to_v.")),
    "^norm_final.weight$": None,  # trained, but never used
}

_LUMINA2: KeyMapping = {
    **_PREFIX,
    "^norm_final.weight$": None,  # trained, but never used
    "^context_refiner.0.attention_norm": "context_refiner.0.norm",
    "^context_refiner.1.attention_norm": "context_refiner.1.norm",
    "^final_layer.adaLN_modulation.1.": "norm_out.linear_1.",
    "^final_layer.linear.": "norm_out.linear_2.",
    ".attention_norm1.": ".norm1.norm.",
    ".attention_norm2.": ".norm2.",
    "^cap_embedder.": "time_caption_embed.caption_embedder.",
    "^t_embedder.mlp.0.": "time_caption_embed.timestep_embedder.linear_1.",
    "^t_embedder.mlp.2.": "time_caption_embed.timestep_embedder.linear_2.",
    ".attention.": ".attn.",
    ".attn.qkv.": _QKV,
    ".out.": ".to_out.0.",
    ".k_norm.": ".norm_k.",
    ".q_norm.": ".norm_q.",
    ".w1.": ".linear_1.",
    ".w2.": ".linear_2.",
    ".w3.": ".linear_3.",
    ".adaLN_modulation.1.": ".norm1.linear.",
}

_LTX: KeyMapping = {
    **_PREFIX,
    "^patchify_proj.": "proj_in.",
    "^adaln_single.": "time_embed.",
    ".q_norm.": ".norm_q.",
    ".k_norm.": ".norm_k.",
}

_LTX2: KeyMapping = {
    **_LTX,
    "^video_embeddings_connector.": None,  # of another model of the pipeline, like the next
    "^audio_embeddings_connector.": None,
    "^audio_patchify_proj.": "audio_proj_in.",
    "^audio_adaln_single.": "audio_time_embed.",
    "^av_ca_video_scale_shift_adaln_single.": "av_cross_attn_video_scale_shift.",
    "^av_ca_a2v_gate_adaln_single.": "av_cross_attn_video_a2v_gate.",
    "^av_ca_audio_scale_shift_adaln_single.": "av_cross_attn_audio_scale_shift.",
    "^av_ca_v2a_gate_adaln_single.": "av_cross_attn_audio_v2a_gate.",
    ".scale_shift_table_a2v_ca_video": ".video_a2v_cross_attn_scale_shift_table",
    ".scale_shift_table_a2v_ca_audio": ".audio_a2v_cross_attn_scale_shift_table",
}

# ComfyUI's names of HunyuanVideo, which are closer to those of Flux, as Tencent's own.
_COMFY_HUNYUAN: KeyMapping = {
    "^model.model.": "",
    "^time_in.in_layer.": "time_in.mlp.0.",
    "^time_in.out_layer.": "time_in.mlp.2.",
    "^guidance_in.in_layer.": "guidance_in.mlp.0.",
    "^guidance_in.out_layer.": "guidance_in.mlp.2.",
    "^txt_in.t_embedder.in_layer.": "txt_in.t_embedder.mlp.0.",
    "^txt_in.t_embedder.out_layer.": "txt_in.t_embedder.mlp.2.",
    "^txt_in.c_embedder.in_layer.": "txt_in.c_embedder.linear_1.",
    "^txt_in.c_embedder.out_layer.": "txt_in.c_embedder.linear_2.",
    "_mod.lin.": "_mod.linear.",
    ".modulation.lin.": ".modulation.linear.",
    "_attn.qkv.": "_attn_qkv.",
    "_attn.proj.": "_attn_proj.",
    "_norm.scale": "_norm.weight",
    "_attn.norm.query_norm.": "_attn_q_norm.",
    "_attn.norm.key_norm.": "_attn_k_norm.",
    ".norm.query_norm.": ".q_norm.",
    ".norm.key_norm.": ".k_norm.",
}

_HUNYUAN_VIDEO: KeyMapping = {
    **_PREFIX,
    **_COMFY_HUNYUAN,
    "^img_in.": "x_embedder.",
    "^time_in.mlp.0.": "time_text_embed.timestep_embedder.linear_1.",
    "^time_in.mlp.2.": "time_text_embed.timestep_embedder.linear_2.",
    "^guidance_in.mlp.0.": "time_text_embed.guidance_embedder.linear_1.",
    "^guidance_in.mlp.2.": "time_text_embed.guidance_embedder.linear_2.",
    "^vector_in.in_layer.": "time_text_embed.text_embedder.linear_1.",
    "^vector_in.out_layer.": "time_text_embed.text_embedder.linear_2.",
    "^double_blocks.": "transformer_blocks.",
    "^single_blocks.": "single_transformer_blocks.",
    ".img_attn_qkv.": _QKV,
    ".txt_attn_qkv.": _ADDED_QKV,
    ".img_attn_q_norm.": ".attn.norm_q.",
    ".img_attn_k_norm.": ".attn.norm_k.",
    ".img_attn_proj.": ".attn.to_out.0.",
    ".txt_attn_q_norm.": ".attn.norm_added_q.",
    ".txt_attn_k_norm.": ".attn.norm_added_k.",
    ".txt_attn_proj.": ".attn.to_add_out.",
    ".img_mod.linear.": ".norm1.linear.",
    ".txt_mod.linear.": ".norm1_context.linear.",
    ".modulation.linear.": ".norm.linear.",
    ".linear1.": _QKV_MLP,
    ".linear2.": ".proj_out.",
    ".q_norm.": ".attn.norm_q.",
    ".k_norm.": ".attn.norm_k.",
    "^final_layer.linear.": "proj_out.",
    "^final_layer.adaLN_modulation.1.": Swap("norm_out.linear."),
    "^txt_in.input_embedder.": "context_embedder.proj_in.",
    "^txt_in.t_embedder.mlp.0.": "context_embedder.time_text_embed.timestep_embedder.linear_1.",
    "^txt_in.t_embedder.mlp.2.": "context_embedder.time_text_embed.timestep_embedder.linear_2.",
    "^txt_in.c_embedder.": "context_embedder.time_text_embed.text_embedder.",
    "^txt_in.individual_token_refiner.blocks.": "context_embedder.token_refiner.refiner_blocks.",
    ".self_attn_qkv.": _QKV,
    ".self_attn_proj.": ".attn.to_out.0.",
    ".adaLN_modulation.1.": ".norm_out.linear.",
    "mlp.0.": "mlp.fc1.",
    "mlp.2.": "mlp.fc2.",
    ".img_mlp.": ".ff.",
    ".txt_mlp.": ".ff_context.",
    ".mlp.": ".ff.",
    ".fc1.": ".net.0.proj.",
    ".fc2.": ".net.2.",
}

_QWEN_IMAGE_21: KeyMapping = {
    **_PREFIX,
    ".img_mlp.gate_up.": Split((".img_mlp.gate_layer.", ".img_mlp.proj.")),  # fused by ComfyUI
}

# By the names of diffusers' classes.
TABLES: Mapping[str, KeyMapping] = {
    "ChromaTransformer2DModel": _CHROMA,
    "ChronoEditTransformer3DModel": _WAN,
    "Flux2Transformer2DModel": _FLUX2,
    "FluxTransformer2DModel": _FLUX,
    "HunyuanVideoTransformer3DModel": _HUNYUAN_VIDEO,
    "LTX2VideoTransformer3DModel": _LTX2,
    "LTXVideoTransformer3DModel": _LTX,
    "Lumina2Transformer2DModel": _LUMINA2,
    "QwenImage21Transformer2DModel": _QWEN_IMAGE_21,
    "QwenImageTransformer2DModel": _PREFIX,
    "SD3Transformer2DModel": _SD3,
    "SkyReelsV2Transformer3DModel": _WAN,
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "ZImageTransformer2DModel": _Z_IMAGE,
}
