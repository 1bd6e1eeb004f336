"""quantize, convert and inspect refuse what load refuses, before a byte is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BLOCKS, compressed, fp8, scales, write
from torch import nn

from fp8gemm import CheckpointError
from fp8gemm.checkpoint import convert_checkpoint, load_checkpoint, open_checkpoint, quantize_checkpoint
from fp8gemm.checkpoint.inspection import inspect

N, K = 32, 64
DENSE = {"o.weight": torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16()}
BYTES, INTEGERS = torch.ones(N, K, dtype=torch.uint8), torch.ones(N, K // 8, dtype=torch.int32)

QUANTIZED: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any] | None]] = {
    "INT8 with a scale": ({"m.weight": BYTES.view(torch.int8), "m.weight_scale": scales(N, 1)}, None),
    "INT8 without a known scale": ({"m.weight": BYTES.view(torch.int8), "m.step": scales(N, 1)}, None),
    "compressed-tensors": ({"m.weight": BYTES.view(torch.int8), "m.weight_scale": scales(N, 1)},
                           compressed("channel", "token")),
    "packed": ({"m.weight_packed": INTEGERS, "m.weight_scale": scales(N, 2), "m.weight_shape": torch.tensor([N, K])},
               None),
    "NVFP4": ({"m.weight": BYTES, "m.weight_scale": fp8(N, K // 8), "m.weight_scale_2": torch.ones(())}, None),
    "MXFP4": ({"e.gate_up_proj_blocks": BYTES.view(1, N, 4, 16), "e.gate_up_proj_scales": BYTES[:1, :].view(1, 16, 4)},
              {"quant_method": "mxfp4"}),
    "GPTQ": ({"m.qweight": INTEGERS, "m.qzeros": INTEGERS, "m.scales": scales(2, N), "m.g_idx": torch.arange(K)},
             {"quant_method": "gptq"}),
    "AWQ without a config": ({"m.qweight": INTEGERS, "m.qzeros": INTEGERS, "m.scales": scales(2, N)}, None),
    "bitsandbytes": ({"m.weight": BYTES.view(-1, 1), "m.weight.absmax": scales(32),
                      "m.weight.quant_state.bitsandbytes__nf4": BYTES[0]}, {"quant_method": "bitsandbytes"}),
    "codes of another name": ({"m.codes": INTEGERS, "m.scale": scales(N, 1)}, None),
    "only the config says so": ({}, {"quant_method": "new"}),
    "only ModelOpt's section says so": ({}, {"quant_algo": "W4A8"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantizing_what_is_quantized_is_refused(kind: str, tmp_path: Path) -> None:
    tensors, config = QUANTIZED[kind]
    folder = write(tmp_path / "in", {**DENSE, **tensors}, config)
    with pytest.raises(CheckpointError, match=r"quantized already|which cannot be read"):
        quantize_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_models_own_integers_are_no_codes(tmp_path: Path) -> None:
    own = {"gate.tid2eid": torch.ones(4, 2, dtype=torch.int32), "mask": torch.ones(2, 2, dtype=torch.uint8)}
    own |= {"o.position_ids": torch.arange(4)[None], "norm.scale": torch.ones(4)}
    folder = write(tmp_path / "in", {**DENSE, **own}, model_config={"model_type": "own"})
    quantize_checkpoint(folder, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert list(checkpoint.layers) == ["o.weight"]
    assert all(torch.equal(checkpoint[name], tensor) for name, tensor in own.items())


def test_inspect_names_what_a_load_would_refuse(tmp_path: Path) -> None:
    tensors = {"a.weight": fp8(N, K), "a.weight_scale": scales(N, 1), "a.svd_up": torch.ones(N, 2)}
    tensors |= {"b.weight": fp8(N, K), "b.weight_scale": scales(N, 1), "b.gain": torch.ones(N)}
    found = inspect(open_checkpoint(write(tmp_path, tensors, compressed("channel", "token"))))
    assert found.failed
    assert [problem.partition(":")[0] for problem in found.problems] == ["a.weight", "b.weight"]
    assert not set(found.problems) & set(found.suspicious)
    assert "broken: a.weight: a.svd_up beside it is a low-rank part" in str(found)


def test_experts_that_cannot_be_read_are_named_for_the_stack(tmp_path: Path) -> None:
    """FP4 experts beside FP8 layers, as DeepSeek publishes them."""
    tensors = {"o.weight": fp8(N, K), "o.weight_scale_inv": scales(1, 1)}
    for e in (0, 1):
        for name, (n, k) in {"gate_proj": (K, N), "up_proj": (K, N), "down_proj": (N, K)}.items():
            tensors[f"experts.{e}.{name}.weight"] = torch.ones(n, k // 2, dtype=torch.int8)
            tensors[f"experts.{e}.{name}.scale"] = torch.full((n, k // 32), 127, dtype=torch.uint8)
    folder = write(tmp_path / "in", tensors, BLOCKS)
    model = nn.Module()
    model.o = nn.Linear(K, N, bias=False)
    model.experts = nn.Module()
    model.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 2 * K, N))
    model.experts.down_proj = nn.Parameter(torch.zeros(2, N, K))
    for how in ({}, {"strict": False}):
        with pytest.raises(CheckpointError, match=r"experts\.1\.down_proj\.weight: .*not FP8 but MXFP4"):
            load_checkpoint(model, folder, **how)
    assert inspect(open_checkpoint(folder)).stacked == {}
    with pytest.raises(CheckpointError, match="not FP8 but MXFP4"):
        convert_checkpoint(folder, tmp_path / "out")
