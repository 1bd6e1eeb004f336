"""Shared by the benchmarks for CUDA GPUs: the GPU's properties and clock, CUDA graphs, and the installed peers.

A *peer* is another library whose FP8 products are measured along with fp8gemm's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
from torch import nn

from fp8gemm import probe
from fp8gemm.engines.triton import Triton

PEERS = Path(__file__).parent.parent / ".peers" / "peers.py"

Y = TypeVar("Y")


@dataclass(frozen=True, kw_only=True)
class Card:
    """The GPU and its driver; ``harness.host`` has the date and the rest."""

    card: str
    capability: tuple[int, int] | None
    cuda: str | None
    triton: str | None

    def __str__(self) -> str:
        capability = "unknown" if self.capability is None else "{}.{}".format(*self.capability)
        return f"{self.card}, compute capability {capability}, CUDA {self.cuda}, triton {self.triton}"


def card_here() -> Card:
    machine = probe("cuda")
    triton = machine.facts("triton", Triton)
    return Card(
        card=machine.name,
        capability=machine.capability,
        cuda=torch.version.cuda,
        triton=None if triton is None else str(triton),
    )


def card_seconds(call: Callable[[], object]) -> float:
    """Seconds between two CUDA events around ``call``, with an empty queue before it: waiting for the host counts."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(call: Callable[[], Y]) -> Callable[[], Y]:
    """``call`` as a CUDA graph; each replay overwrites the tensor that it returns."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()

    def replay() -> Y:
        graph.replay()
        return y

    return replay


def fault() -> str:
    """Why the GPU is unusable in this process, for example after an illegal access; empty if it is usable."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def load_peers(path: Path, *only: str) -> tuple[ModuleType | None, dict[str, str]]:
    """The module that knows the peers, and for each peer (of ``only``) whether it is available or why not."""
    if not path.is_file():
        return None, {"peers": f"no {path.parent.name} folder"}
    spec = importlib.util.spec_from_file_location("peers", path)
    assert spec is not None
    assert spec.loader is not None
    peers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peers)
    loaded, errors = peers.load(only) if only else peers.load()
    return peers, {**dict.fromkeys(loaded, "loaded"), **errors}


def with_torchao(model: nn.Module) -> nn.Module:
    """``model`` itself, with its Linears quantized by torchao: dynamic activations, one scale per row.

    Also applies torchao's recommended Inductor settings to the whole process.

    Raises:
        ImportError: torchao is not installed.
        AssertionError: torchao does not support this machine.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return model


def shortly(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure)[:200]}"
