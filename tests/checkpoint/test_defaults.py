"""Reading and writing checkpoints gives the same bytes whatever dtype and device are torch's defaults."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import BLOCKS, Net, compressed, e8m0, fp8, net_tensors, powers, scales, write
from safetensors.torch import load_file
from torch import nn

from fp8gemm import (
    convert_checkpoint,
    enable_fp8_gemm,
    load_checkpoint,
    open_checkpoint,
    quantize_checkpoint,
    save_checkpoint,
)


@contextlib.contextmanager
def defaults(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def fill(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().as_subclass(torch.Tensor) for name, tensor in model.state_dict().items()}


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].device) == (tensor.dtype, tensor.device), name
        assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


def rows(folder: Path) -> Path:
    return write(
        folder,
        {**net_tensors(), "up.weight_scale": scales(96, 1), "down.weight_scale": scales(160, 1)},
        compressed("channel", "token"),
    )


def mx(folder: Path) -> Path:
    group = {"up.weight_scale": e8m0(powers(96, 5)), "down.weight_scale": e8m0(powers(160, 3))}
    return write(folder, {**net_tensors(), **group}, compressed("group", "token", group_size=32))


def block(folder: Path) -> Path:
    tensors = {**net_tensors(), "up.weight_scale_inv": scales(1, 2), "down.weight_scale_inv": scales(2, 1)}
    return write(folder, tensors, BLOCKS)


def loaded(source: Path, target: Path) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Net()
    load_checkpoint(model, source)
    return fill(model)


def dequantized(source: Path, target: Path) -> dict[str, torch.Tensor]:
    with torch.device("cpu"):
        model = Net()
    load_checkpoint(model, source, dequantize=True)
    return fill(model)


def saved(source: Path, target: Path) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Net()
    load_checkpoint(model, source)
    save_checkpoint(model, target)
    return read(target)


def converted(source: Path, target: Path) -> dict[str, torch.Tensor]:
    convert_checkpoint(open_checkpoint(source), target)
    return read(target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("what", [loaded, dequantized, saved, converted])
@pytest.mark.parametrize("file", [rows, mx, block])
def test_the_same_bytes(file: Callable, what: Callable, dtype: torch.dtype, tmp_path: Path) -> None:
    source = file(tmp_path / "source")
    expected = what(source, tmp_path / "plain")
    with defaults(dtype):
        found = what(source, tmp_path / "other")
    same(found, expected)


@pytest.mark.parametrize("scheme", ["row", "tensor", "block", "weight_only"])
def test_quantizing_gives_the_same_bytes(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    w, bias = torch.randn(130, 200).bfloat16(), torch.randn(130).bfloat16()
    dense = {"a.weight": w, "a.bias": bias, "norm": fp8(1, 3).float()}
    source = write(tmp_path / "dense", dense)

    def quantized(target: Path) -> dict[str, torch.Tensor]:
        quantize_checkpoint(open_checkpoint(source), target, scheme=scheme)
        return read(target)

    expected = quantized(tmp_path / "plain")
    model = nn.ModuleDict({"a": nn.Linear(200, 130, dtype=torch.bfloat16)})
    model["a"].weight.data.copy_(w)
    with defaults(torch.float16):
        found = quantized(tmp_path / "other")
        enable_fp8_gemm(model, module_filter="a")
    assert found.keys() == expected.keys()
    assert all(
        found[name].reshape(-1).view(torch.uint8).equal(expected[name].reshape(-1).view(torch.uint8)) for name in found
    )
