"""A step of a pipelined FP8 product multiplies, and moves what it multiplies: its machine code does little else."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from functools import partial

import pytest
import torch

from fp8gemm import SCHEMES

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

from compilation import compile_for, recorded
from elsewhere import engine_on, grouped, linear

from fp8gemm.engines.triton.plan import place
from fp8gemm.scaled import Accumulate

CARDS = [(8, 9), (12, 0)]  # whose instruction multiplies 16 x 8 x 32; Hopper's and B200's take operands from memory
# Instructions that multiply matrices, that load and store, and that scale and add float32 sums.
WORK = ("QMMA", "LDSM", "LDS", "LDGSTS", "LDG", "FADD", "FMUL", "FFMA")
# Instructions of the loop itself: which stage to read and which to write, two barriers, two waits, the way back.
LOOP = 32
TOKENS = {"row": (128, 1024), "block": (64, 128, 1024)}  # fewer are not quantized, or columns of the product


@pytest.mark.parametrize("stack", [False, True], ids=["linear", "grouped"])
@pytest.mark.parametrize(("scheme", "accumulate"), [("row", "fast"), ("row", "precise"), ("block", "auto")])
@pytest.mark.parametrize("capability", CARDS, ids=lambda value: "sm{}{}".format(*value))
def test_a_step_does_little_else(
    capability: tuple[int, int], scheme: str, accumulate: Accumulate, stack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside each instruction of the work at most one, for its address or to wait; no operand's bytes are permuted."""
    engine, how = engine_on(replace(place(capability), library=frozenset())), SCHEMES[scheme]
    for n, tokens in itertools.product((4096, 4097), (128,) if stack else TOKENS[scheme]):
        if stack:
            call = partial(grouped, engine, how, 8, n, 4096, 8 * tokens, accumulate=accumulate)
        else:
            call = partial(linear, engine, how, n, 4096, tokens, torch.bfloat16, bias=True, accumulate=accumulate)
        launch = recorded(call, monkeypatch)[-1]
        step = compile_for(launch, capability).step
        tile, warps = launch.constants["BLOCK_M"] * launch.constants["BLOCK_N"], launch.options["num_warps"]
        assert step["QMMA"] == tile * 128 // (16 * 8 * 32 * warps), f"{launch.name}: {step}"
        assert step["PRMT"] == 0, f"{launch.name}: {step}"
        assert step.total() <= 2 * sum(step[name] for name in WORK) + LOOP, f"{launch.name}: {step}"
