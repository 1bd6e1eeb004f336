"""A custom checkpoint format: codes under ``name.codes``, one scale per row under ``name.row_scales``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fp8gemm import ROW, Granularity, load_checkpoint, quantize, register_format
from fp8gemm.formats import Contents, Format
from fp8gemm.formats.base import Names


class RowCodes(Format):
    """Only the unusual names are defined here; shapes, dtypes and bytes are read as in any other format."""

    name = "row-codes"
    names = (Names(weight=".codes", scales=(".row_scales",)),)

    def recognises(self, contents: Contents) -> str:
        return "tensors named row_scales" if any(key.endswith(".row_scales") for key in contents.tensors) else ""

    def canonical(self, key: str) -> str:
        return key.replace(".codes", ".weight")

    def granularities(self, contents: Contents, module: str) -> Sequence[Granularity]:
        return (ROW,)


if __name__ == "__main__":
    register_format(RowCodes())
    weight = quantize(torch.randn(32, 64))
    with tempfile.TemporaryDirectory() as folder:
        save_file({"0.codes": weight.data, "0.row_scales": weight.scale}, Path(folder) / "model.safetensors")
        model = nn.Sequential(nn.Linear(64, 32, bias=False))
        print(load_checkpoint(model, folder))
