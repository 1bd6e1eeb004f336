"""Saves that are killed, as transformers with compressed-tensors finds them: the old model or the new one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import after_kills, switched_once

from fp8gemm import FP8GemmOptions, enable_fp8_gemm

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")


def patched(seed: int, scheme: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        tie_word_embeddings=False,
    )
    return enable_fp8_gemm(transformers.LlamaForCausalLM(config).eval(), options=FP8GemmOptions(scheme=scheme))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("old", "new"), [("5GB", 8000), (8000, "5GB"), (8000, 8000), ("5GB", "5GB")])
def test_another_scheme(old: int | str, new: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    tokens = torch.arange(9).view(1, 9)

    def read(folder: Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            # transformers dequantizes what it loads, and then has no such configuration.
            scheme = json.loads((folder / "config.json").read_text())["quantization_config"]
            return str(scheme), model(tokens).logits.tolist()

    models = patched(1, "row"), patched(2, "tensor")
    before, save = (
        lambda folder, model=model, size=size: model.save_pretrained(folder, max_shard_size=size)
        for model, size in zip(models, (old, new), strict=True)
    )
    states, calls = after_kills(tmp_path, before, save, read)
    assert switched_once(states), list(zip(calls, states, strict=False))
