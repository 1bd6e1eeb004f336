"""Lightning Fabric, and tools that count: they see what they see of the dense model."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
import torchinfo
from compatibility import Trial
from lightning_fabric import Fabric
from tiny import DISCARD, IDS, llama, mixture, patched
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fp8gemm import FP8Weight, enable_fp8_gemm


def fabric(precision: Any) -> None:
    run = Fabric(accelerator="cpu", devices=1, precision=precision)
    run.launch()
    torch.manual_seed(0)
    with run.init_module():
        model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    enable_fp8_gemm(model)
    trained = [parameter for parameter in model.parameters() if not isinstance(parameter, FP8Weight)]
    wrapped, optimizer = run.setup(model, torch.optim.SGD(trained, 0.1))
    x = torch.randn(3, 64, dtype=model[0].weight.dtype)
    before = wrapped(x)
    run.backward(before.float().square().sum())
    run.clip_gradients(wrapped, optimizer, max_norm=1.0)
    optimizer.step()
    after = wrapped(x)
    assert not after.equal(before)
    with tempfile.TemporaryDirectory() as folder:
        run.save(f"{folder}/state", {"model": wrapped, "optimizer": optimizer})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        run.load(f"{folder}/state", {"model": wrapped, "optimizer": optimizer})
    assert wrapped(x).equal(after)
    assert sum(isinstance(parameter, FP8Weight) for parameter in model.parameters()) == 2


def summary() -> None:
    dense, model = llama(), patched(llama(), DISCARD)
    ours, theirs = (torchinfo.summary(one, input_data=IDS, verbose=0) for one in (model, dense))
    for count in ("total_params", "total_mult_adds", "total_param_bytes", "total_output_bytes"):
        assert getattr(ours, count) == getattr(theirs, count), count
    norms = sum(p.numel() for p in model.parameters() if not isinstance(p, FP8Weight))
    assert (ours.trainable_params, theirs.trainable_params) == (norms, theirs.total_params)


def flops() -> None:
    for kind in ("llama", "eager", "grouped_mm", "batched_mm"):
        dense = llama() if kind == "llama" else mixture()
        if kind != "llama":
            dense.set_experts_implementation(kind)
        model, counted = patched(dense, DISCARD), []
        for one in (model, dense):
            one.requires_grad_(False)
            one.get_input_embeddings().weight.requires_grad_()
            with FlopCounterMode(display=False) as forward:
                loss = one(IDS, labels=IDS).loss
            with FlopCounterMode(display=False) as backward:
                loss.backward()
            counted.append((forward.get_total_flops(), backward.get_total_flops()))
        assert counted[0] == counted[1], kind
        assert min(counted[0]) > 0


TRIALS = [
    *(
        Trial(
            library="lightning-fabric",
            what=f"`Fabric(precision={precision!r})`: `setup`, `backward`, `clip_gradients`, `save`, `load`",
            run=partial(fabric, precision),
        )
        for precision in ("32-true", "bf16-true", "bf16-mixed")
    ),
    Trial(
        library="torchinfo",
        what="`summary`: parameters, multiply-adds, bytes",
        run=summary,
        note="as of the dense model, but FP8 weights are not trainable; bytes are those of the dtype that a weight has",
    ),
    Trial(
        library="torch",
        what="`FlopCounterMode`, forward and backward, Llama and experts",
        run=flops,
        note="as of a dense model with frozen weights",
    ),
]
