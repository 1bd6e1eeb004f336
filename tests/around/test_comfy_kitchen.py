"""Files of comfy-kitchen, the library with ComfyUI's quantized layouts, and ours read by it.

Not part of the ordinary run: ``pip install comfy-kitchen``, then ``pytest tests/around``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fp8gemm import MX, FP8GemmOptions, Scheme, enable_fp8_gemm, load_checkpoint, save_checkpoint
from fp8gemm.checkpoint import open_checkpoint
from fp8gemm.formats.tiles import tiled

kitchen = pytest.importorskip("comfy_kitchen")
layouts = pytest.importorskip("comfy_kitchen.tensor")

pytestmark = pytest.mark.filterwarnings("default")

# What ComfyUI's loader makes of the names in a description: the layout and the dtype of the stored weight.
ALGORITHMS = {
    "float8_e4m3fn": (layouts.TensorCoreFP8Layout, torch.float8_e4m3fn),
    "float8_e5m2": (layouts.TensorCoreFP8Layout, torch.float8_e5m2),
    "mxfp8": (layouts.TensorCoreMXFP8Layout, torch.float8_e4m3fn),
}


def load_like_comfyui(tensors: dict[str, torch.Tensor], prefix: str, shape: tuple[int, int]) -> Any:
    """A quantized tensor as ComfyUI's mixed-precision Linear builds it from a state dict."""
    described = json.loads(bytes(tensors[f"{prefix}.comfy_quant"].tolist()))
    layout, dtype = ALGORITHMS[described["format"]]
    scale = tensors[f"{prefix}.weight_scale"]
    scale = scale.view(torch.float8_e8m0fnu) if described["format"] == "mxfp8" else scale
    parameters = layout.Params(scale=scale, orig_dtype=torch.float32, orig_shape=shape)
    return layouts.QuantizedTensor(tensors[f"{prefix}.weight"].to(dtype), layout.__name__, parameters)


def written_by_comfyui(weight: torch.Tensor, format: str) -> dict[str, torch.Tensor]:
    """The tensors of one layer as ComfyUI saves them."""
    layout, dtype = ALGORITHMS[format]
    data, parameters = layout.quantize(weight, **({} if format == "mxfp8" else {"dtype": dtype}))
    tensors = {f"m.weight{end}": tensor for end, tensor in layout.state_dict_tensors(data, parameters).items()}
    tensors["m.comfy_quant"] = torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


@pytest.mark.parametrize("shape", [(128, 4), (384, 12), (300, 5)])
def test_the_order_of_tiles(shape: tuple[int, int]) -> None:
    scale = torch.randint(1, 255, shape, dtype=torch.uint8)
    assert torch.equal(tiled(scale), kitchen.float_utils.to_blocked(scale, flatten=False))


@pytest.mark.parametrize("format", ALGORITHMS)
@pytest.mark.parametrize("shape", [(128, 256), (160, 96), (64, 64)])
def test_files_of_comfyui_are_read(format: str, shape: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.exp(torch.randn(shape[0], 1))
    tensors = written_by_comfyui(weight, format)
    save_file(tensors, tmp_path / "net.safetensors")
    answer = load_like_comfyui(tensors, "m", shape).dequantize()
    assert torch.equal(open_checkpoint(tmp_path / "net.safetensors").dequantize("m.weight"), answer)
    assert float((answer - weight).norm() / weight.norm()) < 0.07, "the answer is the weight"
    model = nn.ModuleDict({"m": nn.Linear(shape[1], shape[0], bias=False)})
    load_checkpoint(model, tmp_path / "net.safetensors")
    assert torch.equal(model["m"].weight.dequantize(), answer)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    "options",
    [
        FP8GemmOptions(scheme="tensor"),
        FP8GemmOptions(scheme="tensor", weight_dtype=torch.float8_e5m2),
        FP8GemmOptions(scheme=Scheme(weight=MX, activation=MX, scale_format="ue8m0")),
    ],
    ids=["tensor", "e5m2", "mx"],
)
def test_our_files_are_read_by_comfyuis_layouts(options: FP8GemmOptions, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = enable_fp8_gemm(nn.ModuleDict({"m": nn.Linear(96, 160)}), options=options)
    save_checkpoint(model, tmp_path / "net.safetensors", format="comfy")
    tensors = load_file(tmp_path / "net.safetensors")
    quantized = load_like_comfyui(tensors, "m", (160, 96))
    assert torch.equal(quantized.dequantize(), model["m"].weight.dequantize())  # type: ignore[operator, union-attr]
    x = torch.randn(3, 96)
    answer = nn.functional.linear(x, model["m"].weight.dequantize(), tensors["m.bias"])  # type: ignore[operator, union-attr]
    torch.testing.assert_close(nn.functional.linear(x, quantized, tensors["m.bias"]), answer)
