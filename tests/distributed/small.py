"""Small models whose weights every rank can make again, and comparisons of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import Rank
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fp8gemm import FP8GemmOptions, enable_fp8_gemm
from fp8gemm.weights import FP8Weight


def dense_mlp(rank: Rank, n: int = 96, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, n, dtype=dtype), nn.GELU(), nn.Linear(n, 64, dtype=dtype))
    return model.requires_grad_(False).to(rank.device)


def mlp(
    rank: Rank, n: int = 96, scheme: str = "row", seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Sequential:
    return enable_fp8_gemm(dense_mlp(rank, n, seed, dtype), options=FP8GemmOptions(scheme=scheme))


def tokens(rank: Rank, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(5)).to(rank.device, dtype)


def linear(rank: Rank, n: int, k: int, scheme: str = "row", seed: int = 0, **options: object) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(False).to(rank.device)
    return enable_fp8_gemm(layer, options=FP8GemmOptions(scheme=scheme, **options))


def mesh(rank: Rank) -> DeviceMesh:
    return init_device_mesh(rank.device.type, (rank.world,))


def alone(rank: Rank) -> dist.ProcessGroup:
    """A group of this rank only."""
    return [dist.new_group([one]) for one in range(rank.world)][rank.number]


def bytes_of(weight: FP8Weight) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = weight.scaled()
    return scaled.data.view(torch.uint8), scaled.scale


def values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, FP8Weight) else tensor


def equal(found: FP8Weight, expected: FP8Weight) -> bool:
    """Whether bytes and scales are the same."""
    return all(a.equal(b) for a, b in zip(bytes_of(found), bytes_of(expected), strict=True))


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compares up to the order of sums; with 16 bits, the rounding of their results may then differ."""
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected)
    else:
        assert (found - expected).norm() <= 0.01 * expected.norm()


def same_everywhere(rank: Rank, tensor: torch.Tensor) -> bool:
    mine = tensor.detach().contiguous().view(-1).view(torch.uint8)
    others = [torch.empty_like(mine) for _ in range(rank.world)]
    dist.all_gather(others, mine)
    return all(other.equal(mine) for other in others)


def rows_of(n: int, rank: Rank) -> slice:
    """The rows of ``n`` that a rank holds, as torch.chunk splits them."""
    size = -(-n // rank.world)
    return slice(min(n, rank.number * size), min(n, (rank.number + 1) * size))
