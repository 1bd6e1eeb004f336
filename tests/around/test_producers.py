"""Files that other quantization libraries write themselves are read as those libraries read them, or refused.

Not part of the ordinary run: ``pip install --no-deps sdnq optimum-quanto torchao compressed-tensors``, then
``pytest tests/around``. A library that is not installed is skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fp8gemm import CheckpointError, FP8Weight
from fp8gemm.checkpoint import load_checkpoint, open_checkpoint

pytestmark = pytest.mark.filterwarnings("default")


class Net(nn.Module):
    """Layers of every kind that SDNQ and quanto quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(2048, 64)
        self.small = nn.Linear(128, 48, bias=False)
        self.conv = nn.Conv2d(64, 32, 3)
        self.point = nn.Conv2d(64, 32, 1)
        self.back = nn.ConvTranspose2d(64, 32, 2)
        self.line = nn.Conv1d(64, 32, 3)
        self.table = nn.Embedding(64, 128)
        self.norm = nn.LayerNorm(64)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def saved(folder: Path, model: nn.Module, config: dict[str, Any] | None) -> Path:
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def agree(folder: Path, values: dict[str, torch.Tensor]) -> None:
    """Each weight is what its own library dequantizes it to, in the file and in a model that it is loaded into."""
    checkpoint, model = open_checkpoint(folder), net()
    load_checkpoint(model, folder)
    for name, value in values.items():
        assert torch.equal(checkpoint.dequantize(name), value), name
        weight = model.get_parameter(name)
        assert torch.equal(weight.dequantize() if isinstance(weight, FP8Weight) else weight, value), name


def sdnq_quantized(folder: Path, **options: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file of SDNQ's, and what SDNQ dequantizes each of its weights to."""
    quantizer = pytest.importorskip("sdnq.quantizer")
    chosen = {
        "weights_dtype": "float8_e4m3fn",
        "quant_conv": True,
        "quant_embedding": True,
        "add_skip_keys": False,
        "minimum_allowed_numel": 0,
        **options,
    }
    model = quantizer.sdnq_post_load_quant(net(), **chosen)
    values = {}
    for name, module in model.named_modules():
        if (dequantizer := getattr(module, "sdnq_dequantizer", None)) is not None:
            values[f"{name}.weight"] = dequantizer(
                module.weight,
                module.scale,
                zero_point=module.zero_point,
                svd_up=module.svd_up,
                svd_down=module.svd_down,
                skip_quantized_matmul=dequantizer.use_quantized_matmul,
            ).float()
    config = quantizer.SDNQConfig(**chosen).to_dict()
    return saved(folder, model, {**config, "quant_method": "sdnq"}), values


@pytest.mark.parametrize(
    "options",
    [
        {},  # groups of 1024
        {"group_size": 128},
        {"group_size": -1},
        {"group_size": -2},  # one scale a tensor
        {"use_quantized_matmul": True},  # transposed
        {"use_quantized_matmul": True, "quantized_matmul_dtype": "float16"},
        {"use_quantized_matmul": True, "group_size": 64, "quant_conv": False},
        {"dequantize_fp32": False},
        {"weights_dtype": "float8_e5m2"},
    ],
    ids=str,
)
def test_sdnq(options: dict[str, Any], tmp_path: Path) -> None:
    folder, values = sdnq_quantized(tmp_path, **options)
    assert "wide.weight" in values
    agree(folder, values)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_hadamard": True}, "use_hadamard"),
        ({"use_svd": True}, "svd_"),
        ({"use_quantized_matmul": True, "group_size": -2}, "transposed"),
        ({"weights_dtype": "int8"}, "not FP8 but INT8"),
        ({"weights_dtype": "float8_e4m3fnuz"}, "FNUZ"),
    ],
    ids=str,
)
def test_sdnq_refused(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder, _ = sdnq_quantized(tmp_path, **options)
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(net(), folder, strict=False)


@pytest.mark.parametrize("kind", ["qfloat8", "qfloat8_e5m2"])
def test_quanto(kind: str, tmp_path: Path) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = net()
    quanto.quantize(model, weights=getattr(quanto, kind))
    quanto.freeze(model)
    values = {
        name: weight._data.float() * weight._scale
        for name, weight in model.named_parameters()
        if isinstance(weight, quanto.QTensor)
    }
    assert set(values) >= {"wide.weight", "conv.weight"}
    agree(saved(tmp_path, model, None), values)


def torchao_saved(folder: Path, weight: Any) -> Path:
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    tensors, metadata = support.flatten_tensor_state_dict({"wide.weight": weight})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata)
    return folder


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("tiled", [False, True])
def test_torchaos_mxfp8(dtype: torch.dtype, tiled: bool, tmp_path: Path) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor").MXTensor
    weight = mx.to_mx(torch.randn(160, 192).bfloat16(), dtype, 32, is_swizzled_scales=tiled)
    checkpoint = open_checkpoint(torchao_saved(tmp_path, weight))
    assert torch.equal(checkpoint.dequantize("wide.weight"), weight.dequantize(torch.float32))


def test_torchaos_mxfp4_is_refused(tmp_path: Path) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor").MXTensor
    folder = torchao_saved(tmp_path, mx.to_mx(torch.randn(64, 64).bfloat16(), torch.float4_e2m1fn_x2, 32))
    with pytest.raises(CheckpointError, match=r"a torchao MXTensor of float4_e2m1fn_x2; only"):
        open_checkpoint(folder)["wide.weight"]


def test_compressed_tensors_fuses_what_is_read_and_rotates_online_what_is_refused(tmp_path: Path) -> None:
    """The weight-side transform is in the stored values; the library itself applies the other one at run time."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme, apply_transform_config

    apply = [
        TransformArgs(targets=["wide"], location="weight_input", inverse=True),
        TransformArgs(targets=["wide"], location="input"),
    ]
    whole, fused = (
        TransformConfig(config_groups={"R4": TransformScheme(type="hadamard", apply=parts)})
        for parts in (apply, apply[:1])
    )
    model, x = net(), torch.randn(2, 2048)
    dense = model.wide(x)
    apply_transform_config(model, whole)
    rotated = model.wide.weight.detach()
    assert not torch.allclose(rotated, net().wide.weight, atol=1e-3)
    assert torch.allclose(model.wide(x), dense, atol=1e-4)
    scale = rotated.abs().amax(1, keepdim=True) / 448
    tensors = {"wide.weight": (rotated / scale).to(torch.float8_e4m3fn), "wide.weight_scale": scale}
    save_file(tensors, tmp_path / "model.safetensors")
    for name, kept in (("online", whole), ("fused", fused)):
        config = {"quant_method": "compressed-tensors", "transform_config": kept.model_dump(mode="json")}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        refused = set(open_checkpoint(tmp_path).layout.unsupported)
        assert refused == ({"wide.weight"} if name == "online" else set())
