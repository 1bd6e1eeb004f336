"""torch's own modules as small models with inputs; also the models of torchvision and timm, if they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

BARE = "_needs_example_inputs"
IMAGE = 64


def _seeded(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


class Bare(nn.Module):
    """Parameters of a container, whose use only an observed forward pass shows."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__[BARE] = True
        sizes = {"up": (256, 128), "down": (256, 128), "each": (4, 128, 128)}
        self.weights = nn.ParameterDict({name: nn.Parameter(_seeded(*size) / 12) for name, size in sizes.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weights
        x = F.gelu(x @ w["up"].T) @ w["down"]
        return torch.bmm(x.expand(4, *x.shape), w["each"])


class Sequence(nn.Module):
    """The output of a recurrent module between two Linears."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(128, 128), kind(128, 128), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x))[0])


X = _seeded(2, 16, 128)
PICTURE = _seeded(2, 3, IMAGE, IMAGE)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...]]] = {
    "Linear": (lambda: nn.Linear(128, 256), (X,)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(128, 4, batch_first=True), (X, X, X)),
    "MultiheadAttention kdim": (
        lambda: nn.MultiheadAttention(128, 4, kdim=64, vdim=96, batch_first=True),
        (X, _seeded(2, 8, 64), _seeded(2, 8, 96)),
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 256, batch_first=True), 2),
        (X,),
    ),
    "Transformer": (lambda: nn.Transformer(128, 4, 2, 2, 256, batch_first=True), (X, X.flip(1))),
    "Bilinear": (lambda: nn.Bilinear(64, 128, 32), (_seeded(2, 16, 64), X)),
    "Conv2d patches": (
        lambda: nn.Sequential(nn.Conv2d(3, 128, 8, stride=8), nn.GELU(), nn.Conv2d(128, 64, 1)),
        (PICTURE,),
    ),
    "Conv2d 3x3": (
        lambda: nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)),
        (PICTURE,),
    ),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 32, 2, stride=2), (PICTURE,)),
    "LSTM": (lambda: Sequence(nn.LSTM), (X,)),
    "GRU": (lambda: Sequence(nn.GRU), (X,)),
    "bare parameters": (Bare, (X[0],)),
}


def architectures() -> list[str]:
    return list(CASES)


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    make, inputs = CASES[name]
    torch.manual_seed(0)
    return make().eval(), inputs, {}


TORCHVISION = ("resnet18", "convnext_tiny", "vit_b_32", "swin_t", "swin_v2_t", "maxvit_t", "efficientnet_b0")
TIMM = (
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "mixer_s32_224",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
)


def vision(library: str) -> tuple[str, ...]:
    """The models of a library that are measured; none if it is not installed."""
    try:
        importlib.import_module(library)
    except ImportError:
        return ()
    return {"torchvision": TORCHVISION, "timm": TIMM}[library]


def build_vision(library: str, name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    if library == "timm":
        model = importlib.import_module("timm").create_model(name, pretrained=False)
    else:
        model = importlib.import_module("torchvision.models").get_model(name, weights=None)
    return model.eval(), (_seeded(1, 3, 224, 224),), {}
