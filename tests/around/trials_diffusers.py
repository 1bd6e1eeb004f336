"""diffusers: pipelines saved and loaded whole, adapters fused and swapped, filters, caches and casts."""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from compatibility import Trial
from test_diffusers import answer, flux, unet
from tiny import DISCARD, IDS, KEEP, dequantized, error, patched
from torch import nn

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, layerwise_casting_filter, load_checkpoint, report, save_checkpoint

ABSENT = {"tokenizer": None, "safety_checker": None, "feature_extractor": None}


def pipeline() -> Any:
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8)
    found = diffusers.StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(),
        requires_safety_checker=False,
        **ABSENT,
    )
    found.set_progress_bar_config(disable=True)
    return found


def drawn(pipe: Any) -> torch.Tensor:
    prompt = pipe.text_encoder(IDS[:1])[0].detach()
    found: torch.Tensor = pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=torch.zeros_like(prompt),
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        height=16,
        width=16,
    ).images
    return found


def saved_whole(options: FP8GemmOptions, variant: str | None) -> None:
    pipe, twin = pipeline(), pipeline()
    for name in ("unet", "vae", "text_encoder"):
        enable_fp8_gemm(getattr(pipe, name), options=options)
        setattr(twin, name, getattr(twin, name) if options is KEEP else dequantized(getattr(pipe, name)))
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder, variant=variant, max_shard_size="30KB")
        assert os.path.exists(f"{folder}/model_index.json")
        again = diffusers.DiffusionPipeline.from_pretrained(folder, variant=variant, **ABSENT)
    for name in ("unet", "vae"):
        state, expected = getattr(again, name).state_dict(), getattr(twin, name).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    if options is DISCARD:
        assert drawn(again).equal(drawn(twin))
        enable_fp8_gemm(again.unet)
        assert error(drawn(again), drawn(pipe)) < 0.05


def folder_in_fp8() -> None:
    model = patched(unet())
    kind = type(model)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, folder)
        with torch.device("meta"):
            loaded = kind.from_config(kind.load_config(folder)).eval()
        load_checkpoint(loaded, folder)
    assert answer(loaded).equal(answer(model))


def folder_in_fp8_by_diffusers() -> None:
    model = patched(unet())
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, folder)
        type(model).from_pretrained(folder)


def whole_pipeline() -> None:
    enable_fp8_gemm(pipeline())


def adapter(model: nn.Module, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator, found = torch.Generator().manual_seed(9), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("to_q", "to_v"):
            down = torch.randn(4, module.in_features, generator=generator) * module.in_features**-0.5
            found[f"transformer.{name}.lora_A.weight"] = down
            up = torch.randn(module.out_features, 4, generator=generator) * 0.1
            found[f"transformer.{name}.lora_B.weight"] = up * scale
    return found


def fused(options: FP8GemmOptions, safe: bool) -> None:
    model, twin = patched(flux(), options), dequantized(flux())
    before = answer(model)
    for one in (model, twin):
        one.load_lora_adapter(adapter(one), prefix="transformer")
    attached = answer(model)
    assert error(attached, answer(twin)) < 1e-4
    for one in (model, twin):
        one.fuse_lora(safe_fusing=safe)
    assert error(answer(model), answer(twin)) < 0.05
    model.unfuse_lora()
    assert error(answer(model), attached) < (1e-5 if options is KEEP else 0.05)
    model.unload_lora()
    assert error(answer(model), before) < (1e-5 if options is KEEP else 0.05)


def fused_with_nan() -> None:
    model = patched(flux())
    broken = {name: w * float("nan") for name, w in adapter(model).items()}
    model.load_lora_adapter(broken, prefix="transformer")
    model.fuse_lora(safe_fusing=True)


def swapped() -> None:
    model, twin = patched(flux(), DISCARD), patched(flux(), DISCARD)
    first, second = adapter(twin), adapter(twin, scale=3)
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(first, prefix="transformer", adapter_name="one")
    answer(model)
    model.load_lora_adapter(dict(second), prefix="transformer", adapter_name="one", hotswap=True)
    twin.load_lora_adapter(dict(second), prefix="transformer", adapter_name="one")
    assert error(answer(model), answer(twin)) < 1e-5


def ready_filter() -> None:
    """What stays dense is what diffusers' own casting leaves alone, for every class that it patches here."""
    for make in (flux, unet):
        model = make()
        cast = copy.deepcopy(model)
        cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        kept = {n for n, m in cast.named_modules() if isinstance(m, nn.Linear) and m.weight.dtype == torch.float32}
        enable_fp8_gemm(model, module_filter=layerwise_casting_filter(model))
        rows = report(model)
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert {row.name for row in rows.converted} & linears == linears - kept
        if make is flux:
            assert kept
            assert all(re.search("norm|pos_embed|^proj_out$", name) for name in kept)


def cached(configuration: Callable[[], Any]) -> None:
    for_both = []
    for model in (patched(flux(), DISCARD), dequantized(flux())):
        model.enable_cache(configuration())
        with model.cache_context("one"):
            for_both.append([answer(model) for _ in range(3)])
    assert all(error(ours, theirs) < 1e-4 for ours, theirs in zip(*for_both, strict=True))


def cast_afterwards() -> None:
    model = patched(flux().bfloat16(), DISCARD)
    expected = answer(model, torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert error(answer(model, torch.bfloat16), expected) < 0.03  # biases are rounded


def _trial(what: str, run: Callable[[], object], refused: str = "", note: str = "") -> Trial:
    return Trial(library="diffusers", what=what, run=run, refused=refused, note=note)


TRIALS = [
    *(
        _trial(
            f"a pipeline with patched parts saved and loaded whole{text}",
            partial(saved_whole, options, variant),
            note="models of diffusers are written dense, " + ("bit for bit" if options is KEEP else "dequantized"),
        )
        for text, options, variant in (
            (", originals discarded", DISCARD, None),
            (", originals kept", KEEP, None),
            (", with a variant", DISCARD, "fp16"),
        )
    ),
    _trial("`save_checkpoint`, `from_config` on meta, `load_checkpoint`", folder_in_fp8, note="FP8 on disk"),
    _trial(
        "`from_pretrained` of a folder that `save_checkpoint` wrote",
        folder_in_fp8_by_diffusers,
        refused="Unknown quantization type, got compressed-tensors",
    ),
    _trial(
        "`enable_fp8_gemm` of a pipeline",
        whole_pipeline,
        refused="found StableDiffusionPipeline; patch its parts, each by itself: vae, text_encoder, unet",
    ),
    *(
        _trial(
            f"LoRA: `fuse_lora(safe_fusing={safe})`, `unfuse_lora`, `unload_lora`, originals {kept}",
            partial(fused, options, safe),
        )
        for kept, options in (("kept", KEEP), ("discarded", DISCARD))
        for safe in (False, True)
    ),
    _trial(
        "`fuse_lora(safe_fusing=True)` of a LoRA with NaN",
        fused_with_nan,
        refused="NaNs detected in the merged weights",
    ),
    _trial("LoRA: hot swap", swapped),
    _trial("`layerwise_casting_filter`", ready_filter, note="dense is what layerwise casting leaves alone"),
    _trial("`enable_layerwise_casting` of a patched model", cast_afterwards, note="FP8 weights stay as they are"),
    _trial("FirstBlockCache", partial(cached, lambda: diffusers.hooks.FirstBlockCacheConfig(threshold=0.2))),
    _trial(
        "TaylorSeer cache",
        partial(cached, lambda: diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1)),
    ),
]
