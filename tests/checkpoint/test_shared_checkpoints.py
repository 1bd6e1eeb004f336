"""FP8 checkpoints made by the real tools: every weight bit for bit, every model's logits within 1e-5.

They are not part of the repository: FP8GEMM_CHECKPOINTS names their folder, else ../shared/checkpoints is looked for.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from fp8gemm import FP8GemmOptions, FP8Linear, FP8Weight, ScaledTensor
from fp8gemm.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint

ROOT = Path(os.environ.get("FP8GEMM_CHECKPOINTS", Path(__file__).parents[3] / "shared" / "checkpoints"))
FOLDERS = sorted(path.parent for path in ROOT.glob("*/reference.safetensors"))
COMFY = [folder for folder in FOLDERS if folder.name.startswith("comfy")]
LANGUAGE = [folder for folder in FOLDERS if folder not in COMFY]

pytestmark = pytest.mark.skipif(not FOLDERS, reason=f"no checkpoints in {ROOT}")


def source(folder: Path) -> Path:
    return folder / f"{folder.name}.safetensors" if folder in COMFY else folder


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Attention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
        y: torch.Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return y


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1, self.img_attn = nn.LayerNorm(d), Attention(d)
        self.norm2 = nn.LayerNorm(d)
        self.img_mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.img_attn(self.norm1(x))
        y: torch.Tensor = x + self.img_mlp(self.norm2(x))
        return y


class TinyDiT(nn.Module):
    def __init__(self, d: int = 192) -> None:
        super().__init__()
        self.img_in = nn.Linear(64, d)
        self.double_blocks = nn.Sequential(Block(d), Block(d))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(d, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.final_layer.linear(self.double_blocks(self.img_in(x)))
        return y


def language_model(folder: Path) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_weights_are_bit_equal(folder: Path) -> None:
    checkpoint = open_checkpoint(source(folder))
    answers = {
        key.removeprefix("linear.").removesuffix(".weight_dequant").removeprefix("weight_dequant."): value
        for key, value in load_file(folder / "reference.safetensors").items()
        if "weight_dequant" in key
    }
    assert answers
    for module, answer in answers.items():
        assert torch.equal(checkpoint.dequantize(f"{module}.weight"), answer), module
    for name in checkpoint.layers:  # every other one is at least readable
        assert isinstance(checkpoint[name], ScaledTensor)


@pytest.mark.parametrize("kind", ["dequantized", "fp8"])
@pytest.mark.parametrize("folder", LANGUAGE, ids=lambda folder: folder.name)
def test_language_models_compute_the_reference(folder: Path, kind: str) -> None:
    reference = load_file(folder / "reference.safetensors")
    model = language_model(folder)
    options = FP8GemmOptions(engine="reference", scheme="weight_only")
    report = load_checkpoint(model, folder, options=options, dequantize=kind == "dequantized")
    assert (report.missing, report.unexpected) == ((), ())
    assert any(isinstance(module, FP8Linear) for module in model.modules()) == (kind == "fp8")
    with torch.no_grad():
        logits = model(input_ids=reference["input_ids"]).logits
    assert relative(logits, reference["logits_dequant_fp32"]) < 1e-5


@pytest.mark.parametrize("kind", ["dequantized", "fp8"])
@pytest.mark.parametrize("folder", COMFY, ids=lambda folder: folder.name)
def test_diffusion_models_compute_the_reference(folder: Path, kind: str) -> None:
    reference = load_file(folder / "reference.safetensors")
    with torch.device("meta"):
        model = TinyDiT()
    options = FP8GemmOptions(engine="reference", scheme="weight_only")
    load_checkpoint(model, source(folder), options=options, dequantize=kind == "dequantized")
    with torch.no_grad():
        y = model(reference["x"])
    assert relative(y, reference["y_dequant_fp32"]) < 1e-5


MIXTURES = [folder for folder in LANGUAGE if "moe" in folder.name or "mixtral" in folder.name]


@pytest.mark.parametrize("folder", MIXTURES, ids=lambda folder: folder.name)
def test_experts_stay_fp8_and_are_saved_again_in_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    model = language_model(folder)
    load_checkpoint(model, folder)
    stacks = [p for p in model.parameters() if isinstance(p, FP8Weight) and p.dim() == 3]
    assert stacks
    reference = load_file(folder / "reference.safetensors")
    with torch.inference_mode():
        logits = model(input_ids=reference["input_ids"]).logits
    assert relative(logits.float(), reference["logits_dequant_fp32"].float()) <= 1e-4
    assert all(stack.activity.calls and not stack.activity.dequantizations for stack in stacks)
    before = open_checkpoint(folder)
    blocks = "weight_scale_inv" in " ".join(before.contents.tensors)
    save_checkpoint(model, tmp_path, format="fine-grained" if blocks else "compressed-tensors")
    after = open_checkpoint(tmp_path)
    experts = [name for name in before.layers if ".experts." in name]
    assert experts
    for name in experts:
        old, new = before[name], after[name]
        assert isinstance(old, ScaledTensor)
        assert isinstance(new, ScaledTensor)
        assert torch.equal(old.data.view(torch.uint8), new.data.view(torch.uint8)), name
        assert old.granularity == new.granularity, name
        assert torch.equal(old.scale, new.scale), name
