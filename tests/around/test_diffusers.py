"""diffusers around a patched model: what is made from it, what is read off it, what moves it.

Not part of the ordinary run: ``pip install diffusers``, then ``pytest tests/around``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fp8gemm import FP8GemmOptions, FP8Linear, disable_fp8_gemm, enable_fp8_gemm, report

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("default")


def filled(model: Any) -> Any:
    """Weights of a size at which every layer matters; diffusers leaves some at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(values * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(values * 0.02 + (0 if name.endswith("bias") else 1))
    return model.eval()


def flux() -> Any:
    return filled(
        diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            axes_dims_rope=[8, 12, 12],
            guidance_embeds=False,
        )
    )


def unet() -> Any:
    return filled(
        diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=16,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
            norm_num_groups=8,
            attention_head_dim=4,
        )
    )


def answer(model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    with torch.no_grad():
        if isinstance(model, diffusers.UNet2DConditionModel):
            return model(noise(1, 4, 16, 16), torch.tensor(500), noise(1, 6, 64), return_dict=False)[0]
        return model(
            hidden_states=noise(1, 16, 16),
            encoder_hidden_states=noise(1, 8, 64),
            pooled_projections=noise(1, 64),
            timestep=torch.tensor([0.5], dtype=dtype),
            img_ids=torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], dim=-1),
            txt_ids=torch.zeros(8, 3),
            return_dict=False,
        )[0]


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y - expected).norm() / expected.norm()).item()


def _from_transformer(model: Any) -> Any:
    return diffusers.FluxControlNetModel.from_transformer(
        model, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=4
    )


def test_a_controlnet_made_from_a_patched_model_gets_values() -> None:
    """diffusers hands the blocks' state dict to a dense model by ``load_state_dict(strict=False)``."""
    model = flux()
    untouched = dict(_from_transformer(model).named_parameters())
    enable_fp8_gemm(model, module_filter="*transformer_blocks*")
    control = _from_transformer(model)
    ours = {name for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    compared = 0
    for name, module in control.named_modules():
        if isinstance(module, nn.Linear) and name in ours:
            assert torch.equal(module.weight, model.get_submodule(name).weight.dequantize()), name
            assert error(module.weight, untouched[f"{name}.weight"]) < 0.04, name
            compared += 1
    assert compared > 5
    assert all(type(parameter) is nn.Parameter for parameter in control.parameters())


@pytest.mark.parametrize(
    ("make", "control_of"), [(flux, _from_transformer), (unet, diffusers.ControlNetModel.from_unet)]
)
def test_a_controlnet_that_loads_strictly_says_what_is_too_much(make: Any, control_of: Any) -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key.* in state_dict: .*weight_scale"):
        control_of(enable_fp8_gemm(make()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("make", [flux, unet])
def test_a_patched_model_says_the_same_of_itself(make: Callable[[], Any], dtype: torch.dtype) -> None:
    model = make().to(dtype)
    count, bytes_before = model.num_parameters(), model.get_memory_footprint()
    enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage="discard"))
    assert model.dtype == dtype
    assert model.num_parameters() == count
    assert model.get_memory_footprint() == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert model.get_memory_footprint() < bytes_before
    disable_fp8_gemm(model)
    assert model.get_memory_footprint() == bytes_before


def test_a_model_without_biases_runs_in_the_dtype_that_it_says() -> None:
    class Bare(diffusers.ModelMixin, diffusers.ConfigMixin):
        config_name = "config.json"

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.to(self.dtype))

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = enable_fp8_gemm(Bare().to(dtype))
        assert model(torch.randn(2, 64)).dtype == model.dtype == dtype


def test_copies_and_memory_formats_compute_the_same() -> None:
    for make in (flux, unet):
        model = make()
        dense = answer(model)
        enable_fp8_gemm(model)
        expected = answer(model)
        assert error(expected, dense) < 0.12
        assert torch.equal(answer(copy.deepcopy(model)), expected)
        assert error(answer(model.to(memory_format=torch.channels_last)), expected) < 1e-4
        assert all(row.calls for row in report(model).converted if "add_embedding" not in row.name)


def test_a_cast_to_float8_leaves_an_fp8_weight_alone() -> None:
    """As diffusers' layerwise casting does before and after each call."""
    model = enable_fp8_gemm(flux().bfloat16(), options=FP8GemmOptions(fp16_weight_storage="keep"))
    layer = model.transformer_blocks[0].attn.to_q
    expected, before = answer(model, torch.bfloat16), layer.scaled().data.view(torch.uint8).clone()
    model.to(torch.float8_e4m3fn)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.bias.dtype == torch.float8_e4m3fn
    model.to(torch.bfloat16)
    assert error(answer(model, torch.bfloat16), expected) < 0.05  # norms and biases are rounded by the cast
    assert torch.equal(layer.scaled().data.view(torch.uint8), before)


@pytest.mark.parametrize("storage", ["keep", "discard"])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading_moves_bytes(kind: str, storage: Any) -> None:
    model = enable_fp8_gemm(flux(), options=FP8GemmOptions(fp16_weight_storage=storage))
    expected, cpu = answer(model), torch.device("cpu")
    diffusers.hooks.apply_group_offloading(
        model,
        onload_device=cpu,
        offload_device=cpu,
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
    )
    for _ in range(3):
        assert torch.equal(answer(model), expected)
    assert all(row.dequantizations == 0 for row in report(model).converted)


def test_group_offloading_to_disk_is_refused(tmp_path: Path) -> None:
    """diffusers refuses torchao's weights likewise: safetensors writes memory, and these have none of their dtype."""
    model, cpu = enable_fp8_gemm(flux()), torch.device("cpu")
    with pytest.raises(RuntimeError, match=r"data pointer|memory"):
        diffusers.hooks.apply_group_offloading(
            model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
        )


ASSIGNMENTS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "weight.data =": lambda layer, w: setattr(layer.weight, "data", w),
    "weight.data = a view": lambda layer, w: setattr(layer.weight, "data", w.view(-1).view(64, 64)),
    "weight.data.copy_": lambda layer, w: layer.weight.data.copy_(w),
    "weight.data[:] =": lambda layer, w: layer.weight.data.__setitem__(slice(None), w),
    "weight.copy_": lambda layer, w: layer.weight.copy_(w),
    "weight = Parameter": lambda layer, w: setattr(layer, "weight", nn.Parameter(w)),
    "load_state_dict": lambda layer, w: layer.load_state_dict({"weight": w, "bias": layer.bias}),
    "load_state_dict, assign": lambda layer, w: layer.load_state_dict({"weight": w, "bias": layer.bias}, assign=True),
}


@torch.no_grad()
@pytest.mark.parametrize("storage", ["keep", "discard"])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_merging_scripts_assign_weights(assignment: str, storage: Any) -> None:
    layer = enable_fp8_gemm(nn.Linear(64, 64), options=FP8GemmOptions(fp16_weight_storage=storage))
    x, w = torch.randn(3, 64), torch.randn(64, 64)
    layer(x)
    ASSIGNMENTS[assignment](layer, w)
    assert error(layer(x) - layer.bias, x @ w.T) < 0.05
    assert error(layer.weight.dequantize(), w) < 0.04
