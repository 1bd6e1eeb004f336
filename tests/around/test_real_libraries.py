"""Round trips through the installed compressed-tensors and transformers.

Not part of the ordinary run: ``pip install compressed-tensors accelerate transformers``, then ``pytest tests/around``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fp8gemm import BLOCK_128, GROUP_128, FP8GemmOptions, FP8Linear, Scheme, enable_fp8_gemm
from fp8gemm.checkpoint import (
    convert_checkpoint,
    load_checkpoint,
    open_checkpoint,
    quantize_checkpoint,
    save_checkpoint,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("default")

UE8M0 = Scheme(weight=BLOCK_128, activation=GROUP_128, scale_format="ue8m0")


def llama(**changes: Any) -> Any:
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 320,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def moe(kind: str) -> Any:
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "tie_word_embeddings": False,
    }
    if kind == "qwen3_moe":
        sizes |= {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 64}
        config = transformers.Qwen3MoeConfig(**sizes)
    else:
        config = transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def without_head(name: str, module: torch.nn.Module) -> bool:
    return name != "lm_head"


def compare(model: Any, loaded: Any) -> None:
    """Every weight of ``loaded``, dense, is what ``model`` holds, in FP8 or dense."""
    ours = dict(model.named_modules())
    count = 0
    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear):
            own = ours[name]
            assert module.weight.dtype == torch.float32, name
            answer = own.weight.dequantize() if isinstance(own, FP8Linear) else own.weight
            assert torch.equal(module.weight, answer), name
            count += isinstance(own, FP8Linear)
    assert count > 0
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        difference = loaded(tokens).logits - dense(model)(tokens).logits
    assert float(difference.norm()) < 1e-5 * float(loaded(tokens).logits.norm())


def dense(model: Any) -> Any:
    from fp8gemm import disable_fp8_gemm

    disable_fp8_gemm(model)
    return model


def patched(model: Any, scheme: Any) -> Any:
    options = FP8GemmOptions(scheme=scheme, fp16_weight_storage="discard", engine="reference")
    return enable_fp8_gemm(model, options=options, module_filter=without_head)


def from_pretrained(folder: Path) -> Any:
    config = transformers.CompressedTensorsConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).eval()


@pytest.mark.parametrize("scheme", ["row", "tensor", "block", "weight_only"])
def test_transformers_loads_our_compressed_tensors(scheme: Any, tmp_path: Path) -> None:
    model = patched(llama(), scheme)
    save_checkpoint(model, tmp_path)
    compare(model, from_pretrained(tmp_path))


@pytest.mark.parametrize("scheme", ["block", UE8M0])
def test_transformers_loads_our_fine_grained(scheme: Any, tmp_path: Path) -> None:
    model = patched(llama(), scheme)
    save_checkpoint(model, tmp_path, format="fine-grained")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    )
    # What is not quantized stays in the file's dtype there; the file is float32 here.
    compare(model, loaded.eval())


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("quantized", [False, True])
def test_transformers_loads_our_experts(kind: str, quantized: bool, tmp_path: Path) -> None:
    model = moe(kind)
    if quantized:
        model.save_pretrained(tmp_path / "dense")
        quantize_checkpoint(tmp_path / "dense", tmp_path / "out")
        load_checkpoint(model, tmp_path / "out", dequantize=True)
    else:
        save_checkpoint(patched(model, "row"), tmp_path / "out")
    loaded = from_pretrained(tmp_path / "out")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        a, b = loaded(tokens).logits, dense(model)(tokens).logits
    assert float((a - b).norm()) < 1e-5 * float(b.norm())


def test_transformers_loads_a_tied_head_of_ours(tmp_path: Path) -> None:
    model = enable_fp8_gemm(llama(tie_word_embeddings=True))
    save_checkpoint(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight.dequantize())


def test_transformers_loads_what_was_converted(tmp_path: Path) -> None:
    model = patched(llama(), "block")
    save_checkpoint(model, tmp_path / "fine", format="fine-grained")
    convert_checkpoint(tmp_path / "fine", tmp_path / "ct", max_shard_size="500KB")
    compare(model, from_pretrained(tmp_path / "ct"))


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_we_load_what_compressed_tensors_writes(strategy: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = llama()
    arguments = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    if strategy == "block":
        arguments["block_structure"] = [128, 128]
    inputs = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments), input_activations=inputs)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="float-quantized")
    apply_quantization_config(model, config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            w = module.weight.data
            if strategy == "block":
                n, k = w.shape
                parts = w.reshape(n // 128, 128, k // 128, 128)
                low, high = parts.amin(dim=(1, 3)), parts.amax(dim=(1, 3))
            else:
                low, high = (
                    (w.amin(1, True), w.amax(1, True)) if strategy == "channel" else (w.amin()[None], w.amax()[None])
                )
            scale, _ = calculate_qparams(low, high, scheme.weights)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="float-quantized")
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format.name == "compressed-tensors"
    assert len(checkpoint.layers) == 14
    compressor.decompress_model(model)
    for name in checkpoint.layers:
        answer = model.get_parameter(name)
        assert torch.equal(checkpoint.dequantize(name), answer), name
