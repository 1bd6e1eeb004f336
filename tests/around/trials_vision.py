"""torchvision and timm: their models, heads and checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from compatibility import Trial
from tiny import DISCARD, dequantized, error, patched
from torch import nn

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, report

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
OPTIONS = FP8GemmOptions(scheme="weight_only")
VISION = torchvision.models
TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "VisionTransformer": lambda: VISION.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10),
    "SwinTransformer": lambda: VISION.SwinTransformer([4, 4], 32, [2, 2], [2, 2], [4, 4], num_classes=10),
    "ResNet-18": lambda: VISION.resnet18(num_classes=10),
}
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 4},
    "convnextv2_atto": {},
}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # some heads start at zero
        if parameter.dim() == 2 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def runs(make: Callable[[], nn.Module], share: float) -> None:
    dense = _seeded(make)
    model = patched(dense, OPTIONS)
    assert error(model(X), dequantized(model)(X)) < 1e-4
    coverage = report(model).coverage
    assert coverage is not None
    assert coverage.share > share


@torch.no_grad()
def features() -> None:
    """Of layers by name, which torchvision takes from a symbolic trace."""
    model = patched(_seeded(TORCHVISION["VisionTransformer"]), OPTIONS)
    names = {"encoder.layers.encoder_layer_1.mlp": "mlp", "heads.head": "head"}
    found = torchvision.models.feature_extraction.create_feature_extractor(model, names)(X)
    assert found["mlp"].shape == (2, 17, 64)
    assert error(found["head"], model(X)) < 1e-6


def from_timm(name: str, share: float) -> None:
    runs(lambda: timm.create_model(name, num_classes=10, **TIMM[name]), share)


def _vit() -> Any:
    return _seeded(lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, **TIMM["vit_tiny_patch16_224"]))


@torch.no_grad()
def new_head() -> None:
    """It is dense until the model is patched again, as the report says."""
    model = enable_fp8_gemm(_vit())
    model.reset_classifier(5)
    assert model(X).shape == (2, 5)
    assert [(row.name, row.reason) for row in report(model).kept] == [("head", "added after patching")]
    enable_fp8_gemm(model)
    assert not report(model).kept


def checkpoints() -> None:
    model = patched(_vit(), DISCARD)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.save(model.state_dict(), f"{folder}/model.pth")
        again = enable_fp8_gemm(timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8))
        timm.models.load_checkpoint(again.eval(), f"{folder}/model.pth")
        assert again(X).equal(model(X))


def checkpoints_into_dense() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(patched(_vit()).state_dict(), f"{folder}/model.pth")
        timm.models.load_checkpoint(_vit(), f"{folder}/model.pth")


def trains_with_checkpointing() -> None:
    gradients = []
    for recompute in (False, True):
        model = patched(_vit(), DISCARD)
        model.set_grad_checkpointing(recompute)
        model.train()(X).square().sum().backward()
        gradients.append(model.pos_embed.grad)
    assert error(gradients[1], gradients[0]) < 1e-5


def average() -> None:
    model = patched(_vit())
    timm.utils.ModelEmaV3(model, decay=0.9).update(model)


TRIALS = [
    *(
        Trial(library="torchvision", what=name, run=partial(runs, make, 0 if "ResNet" in name else 0.99), note=note)
        for (name, make), note in zip(
            TORCHVISION.items(), ("", "", "of its products, only the head runs on FP8"), strict=True
        )
    ),
    Trial(library="torchvision", what="`create_feature_extractor` of a patched VisionTransformer", run=features),
    *(
        Trial(library="timm", what=f"`create_model({name!r})`", run=partial(from_timm, name, share))
        for name, share in zip(TIMM, (0.99, 0.99, 0.9), strict=True)
    ),
    Trial(
        library="timm", what="`reset_classifier` of a patched model", run=new_head, note="the report lists the new head"
    ),
    Trial(library="timm", what="`load_checkpoint` of a patched model's state dict into a patched one", run=checkpoints),
    Trial(
        library="timm",
        what="`load_checkpoint` of a patched model's state dict into a dense one",
        run=checkpoints_into_dense,
        refused="Unexpected key(s) in state_dict",
    ),
    Trial(library="timm", what="`set_grad_checkpointing`, from the first step on", run=trains_with_checkpointing),
    Trial(
        library="timm",
        what="`ModelEmaV3` of a patched model",
        run=average,
        refused="would write to the FP8 bytes of a state dict and leave their scales",
    ),
]
