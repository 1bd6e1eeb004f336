"""The first and the last steps of a diffusion loop without quantized activations, from the same FP8 bytes."""

import torch
from torch import nn

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, precision_schedule, report, set_precision

STEPS = 8


class Denoiser(nn.Module):
    """Predicts noise from a latent ``[B, 64]`` and a time."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(65 if block == 0 else 256, 256) for block in range(4))
        self.out = nn.Linear(256, 64)

    def forward(self, x: torch.Tensor, time: float) -> torch.Tensor:
        h = torch.cat([x, x.new_full((len(x), 1), time)], dim=1)
        for block in self.blocks:
            h = torch.nn.functional.silu(block(h))
        return self.out(h)


@torch.no_grad()
def denoise(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for step in range(STEPS):
        x = x - model(x, step / STEPS) / STEPS
    return x


torch.manual_seed(0)
model, noise = Denoiser(), torch.randn(16, 64)
dense = denoise(model, noise)
# The reference engine quantizes activations on a CPU too, where others leave them as they are.
enable_fp8_gemm(model, options=FP8GemmOptions(scheme="tensor", engine="reference", fp16_weight_storage="keep"))


def error(y: torch.Tensor) -> str:
    return f"{100 * ((y - dense).norm() / (dense - noise).norm()).item():.3f} %"


print("FP8                         ", error(denoise(model, noise)))
with precision_schedule(model, STEPS, first=1, last=2):
    print("first 1, last 2 weight-only ", error(denoise(model, noise)))
set_precision(model, "out", "original")
print("the last layer original     ", error(denoise(model, noise)))
set_precision(model, "*", "weight_only")
print("weight-only                 ", error(denoise(model, noise)))
set_precision(model, "*", "original")
print("the originals               ", error(denoise(model, noise)))
print(report(model))
