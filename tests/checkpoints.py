"""Checkpoints written by hand for the tests: the names and shapes of every format, with values known exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def fp8(n: int, k: int, *, seed: int = 0, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """FP8 bytes [n, k] of random finite values."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, k, generator=generator) * 4).to(dtype)


def scales(*shape: int, seed: int = 1) -> torch.Tensor:
    """Positive float32 scales that no shorter dtype holds."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.01


def powers(*shape: int, seed: int = 2) -> torch.Tensor:
    """Scales that are powers of two between 2**-8 and 2**3."""
    return torch.exp2(torch.randint(-8, 4, shape, generator=torch.Generator().manual_seed(seed)).float())


def e8m0(scale: torch.Tensor) -> torch.Tensor:
    """Powers of two as uint8, computed from the definition 2**(b - 127)."""
    return (torch.log2(scale) + 127).to(torch.uint8)


def blocks(data: torch.Tensor, scale: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The float32 values of a matrix with block scales, element by element of the grid: an independent answer."""
    values = data.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            values[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols] *= scale[i, j]
    return values


def compressed(weights: str, inputs: str | None, **more: Any) -> dict[str, Any]:
    """A compressed-tensors config with one group."""
    arguments: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {**arguments, "strategy": weights, **more}}
    static = inputs == "tensor"
    group["input_activations"] = inputs and {**arguments, "strategy": inputs, "dynamic": not static}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


def write(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any] | None = None,
    *,
    metadata: dict[str, str] | None = None,
    model_config: dict[str, Any] | None = None,
) -> Path:
    """A folder with model.safetensors, and config.json if there is a config of either kind."""
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned: save_file refuses tensors that share memory.
    contiguous = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata=metadata)
    if config is not None or model_config is not None:
        whole = {**(model_config or {}), **({"quantization_config": config} if config is not None else {})}
        (folder / "config.json").write_text(json.dumps(whole))
    return folder


class Net(nn.Module):
    """Two Linears and a norm: ``up [96, 160]``, ``norm [96]``, ``down [160, 96]``."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.up = nn.Linear(160, 96, dtype=dtype)
        self.norm = nn.LayerNorm(96, dtype=dtype)
        self.down = nn.Linear(96, 160, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.norm(self.up(x)))
        return y


def net_tensors() -> dict[str, torch.Tensor]:
    """What ``Net`` needs beside its FP8 weights' scales, which ``up`` and ``down`` still lack."""
    return {
        "up.weight": fp8(96, 160, seed=3),
        "up.bias": torch.arange(96, dtype=torch.bfloat16) / 8,
        "norm.weight": torch.full((96,), 1.5, dtype=torch.bfloat16),
        "norm.bias": torch.full((96,), -0.5, dtype=torch.bfloat16),
        "down.weight": fp8(160, 96, seed=4),
    }
