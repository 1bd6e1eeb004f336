"""FP8 weights in two processes over gloo: DDP, FSDP2, tensor parallelism, collectives, distributed checkpoints."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fp8gemm import FP8GemmOptions, UnsupportedError, enable_fp8_gemm, report
from fp8gemm.weights import FP8Weight

WORLD = 2
AREAS: dict[str, Callable[[int], None]] = {}


def area(check: Callable[[int], None]) -> Callable[[int], None]:
    """A check that each of the processes runs with its rank."""
    AREAS[check.__name__] = check
    return check


def mlp(n: int = 96, scheme: str = "row", seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, n, dtype=dtype), nn.GELU(), nn.Linear(n, 64, dtype=dtype))
    return enable_fp8_gemm(model.requires_grad_(False), options=FP8GemmOptions(scheme=scheme))


def tokens(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(5)).to(dtype)


def same_everywhere(tensor: torch.Tensor) -> bool:
    mine = tensor.detach().contiguous().view(-1).view(torch.uint8)
    others = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(others, mine)
    return all(other.equal(mine) for other in others)


def bytes_of(weight: FP8Weight) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = weight.scaled()
    return scaled.data.view(torch.uint8), scaled.scale


def raises_everywhere(act: Callable[[], object], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        act()


class Headed(nn.Module):
    """A frozen FP8 model and a head that trains."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = mlp(seed=seed, dtype=dtype)
        self.head = nn.Linear(64, 8, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@area
def ddp(rank: int) -> None:
    """Rank 0's weights reach the others bit for bit, with scales, and gradients are averaged."""
    from torch.nn.parallel import DistributedDataParallel

    for dtype, options in (
        (torch.float32, {}),
        (torch.bfloat16, {"find_unused_parameters": True}),
        (torch.bfloat16, {"gradient_as_bucket_view": True}),
    ):
        model, first = Headed(rank, dtype), Headed(0, dtype)
        if "find_unused_parameters" in options:
            model.unused = nn.Linear(4, 4)
        wrapped = DistributedDataParallel(model, **options)
        for mine, theirs in ((model.body[0], first.body[0]), (model.body[2], first.body[2])):
            assert all(a.equal(b) for a, b in zip(bytes_of(mine.weight), bytes_of(theirs.weight), strict=True))
            assert mine.bias.equal(theirs.bias)
            assert mine.activity.dequantizations == 0
        wrapped(tokens(dtype) * (rank + 1)).square().sum().backward()
        assert sum(model.body[0].activity.kernels.values()) == 1
        grads = []
        for factor in (1, 2):
            first.zero_grad()
            first(tokens(dtype) * factor).square().sum().backward()
            grads.append(first.head.weight.grad.clone())
        torch.testing.assert_close(model.head.weight.grad, (grads[0] + grads[1]) / 2)
    kept = nn.Linear(64, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        kept.weight.mul_(rank + 1)
    enable_fp8_gemm(kept, options=FP8GemmOptions(fp16_weight_storage="keep"))
    kept.weight.requires_grad_(False)
    DistributedDataParallel(kept)
    assert same_everywhere(kept.original_weight)
    assert all(map(same_everywhere, bytes_of(kept.weight)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, rank, store = sys.argv[1:]
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, WORLD), rank=int(rank), world_size=WORLD, timeout=timedelta(seconds=60)
    )
    AREAS[name](int(rank))
    dist.barrier()
    dist.destroy_process_group()
