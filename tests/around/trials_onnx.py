"""torch.onnx: the files that it writes of patched models, checked by onnx and run by onnxruntime."""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import transformers
from compatibility import Trial
from tiny import DISCARD, bert, error, patched
from torch import nn

from fp8gemm import FP8GemmOptions, Scheme, enable_fp8_gemm
from fp8gemm.scaled import BLOCK_128, GROUP_128, ROW, TENSOR

FP8 = onnx.TensorProto.FLOAT8E4M3FN
SCALES = {"a scale for each row": ROW, "one scale": TENSOR, "blocks of 128x128": BLOCK_128, "groups of 128": GROUP_128}


@torch.no_grad()
def exported(model: nn.Module, *inputs: torch.Tensor, names: tuple[str, ...] = ("x",), **options: Any) -> Any:
    """The ONNX model, which computes what the model does, also for another number of rows."""
    rows = torch.export.Dim("rows", min=2, max=64)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(folder, "model.onnx"))
        shapes = tuple({0: rows} for _ in inputs)
        options = {"input_names": list(names), "dynamic_shapes": shapes, "dynamo": True, "verbose": False, **options}
        torch.onnx.export(model, inputs, path, **options)
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path)
        for given in (inputs, tuple(torch.cat([x, x[:1]]) for x in inputs)):
            y = model(*given)
            y = y if isinstance(y, torch.Tensor) else y[0]
            found = session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})[0]
            assert error(torch.from_numpy(found), y) < 1e-3
        return onnx.load(path)


def fp8_bytes(written: Any) -> int:
    return sum(len(tensor.raw_data) for tensor in written.graph.initializer if tensor.data_type == FP8)


def layers(scales: str) -> None:
    """The file has the FP8 bytes once, and little else."""
    torch.manual_seed(0)
    options = FP8GemmOptions(scheme=Scheme(weight=SCALES[scales], activation=None))
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(320, 512), nn.ReLU(), nn.Linear(512, 200)), options=options)
    written = exported(model, torch.randn(4, 320))
    assert fp8_bytes(written) == 320 * 512 + 512 * 200
    assert written.ByteSize() < 1.15 * fp8_bytes(written)
    dequantized = sum(node.op_type == "DequantizeLinear" for node in written.graph.node)
    assert dequantized == (2 if SCALES[scales] in (ROW, TENSOR) else 0)


def of_transformers() -> None:
    torch.manual_seed(0)
    model = patched(transformers.BertModel(bert(attn_implementation="eager"), add_pooling_layer=False).eval(), DISCARD)
    ids = torch.arange(18).view(2, 9) % 60 + 3
    written = exported(model, ids, names=("input_ids",))
    assert fp8_bytes(written) == 2 * (4 * 64 * 64 + 2 * 64 * 96)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(4, 96, 128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x[:, None], self.up_proj.transpose(1, 2))


def experts() -> None:
    torch.manual_seed(0)
    model = enable_fp8_gemm(Experts(), module_filter=lambda name, module: True)
    assert fp8_bytes(exported(model, torch.randn(3, 5, 128))) == 4 * 96 * 128


def older() -> None:
    exported(patched(nn.Sequential(nn.Linear(64, 32))), torch.randn(2, 64), dynamo=False, dynamic_shapes=None)


def _onnx(what: str, run: Any, **more: str) -> Trial:
    return Trial(library="onnx", what=what, run=run, **more)


TRIALS = [
    *(
        _onnx(
            f"`torch.onnx.export(dynamo=True)`, {scales}",
            partial(layers, scales),
            note="FP8 bytes once, dequantized by " + ("DequantizeLinear" if grid in (ROW, TENSOR) else "Cast and Mul"),
        )
        for scales, grid in SCALES.items()
    ),
    _onnx("`torch.onnx.export(dynamo=True)` of BERT", of_transformers),
    _onnx("`torch.onnx.export(dynamo=True)` of experts", experts),
    _onnx(
        "`torch.onnx.export(dynamo=False)`", older, refused="use dynamo=True, or call fp8gemm.disable_fp8_gemm(model)"
    ),
]
