"""transformers' own conversion of checkpoints, applied to FP8 weights: the values that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mixtures
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fp8gemm import CheckpointError, FP8Linear, FP8Weight, UnsupportedError, load_checkpoint, save_checkpoint
from fp8gemm.checkpoint.targets import initialize_transient

transformers = pytest.importorskip("transformers")
FP8 = torch.float8_e4m3fn
# Vision-language models whose modules are called otherwise in their files, and files that are split, joined, permuted.
RENAMED = ["qwen2_vl", "qwen2_5_vl", "mistral3", "llava", "gemma3", "internvl", "mllama", "paligemma", "step3p7"]
RENAMED += ["kimi_k25", "kimi_linear", "deepseek_v4", "phimoe", "ernie4_5_moe", "nemotron_h", "granitemoe", "mixtral"]
RENAMED += [
    "nomic_bert",
    "gte",
    "mistral_large4",
    "inkling_text",
    "glm5_next",
    "qwen3_vl_moe",
    "gpt_oss",
    "llama4_text",
]


def quantized(weight: torch.Tensor, rows: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 bytes, with a scale for each row or for each matrix, by hand."""
    dims = (-1,) if rows == 1 else (-1, -2)
    scale = weight.abs().amax(dims, keepdim=True).clamp(min=1e-6) / 448
    return (weight / scale).to(FP8).contiguous(), scale


def checkpoint(source: Path, folder: Path, rows: int | None) -> tuple[Path, Path]:
    """A dense checkpoint's matrices in FP8, and the same values dense."""
    tensors: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors.update(load_file(file))
    stored, plain = {}, {}
    for name, tensor in tensors.items():
        stack = tensor.dim() == 3 and any(part in name for part in ("experts", "put_linear", "moe."))
        matrix = tensor.dim() == 2 and name.endswith(".weight") and "embed" not in name
        if not (stack or matrix) or min(tensor.shape[-2:]) < 16:
            stored[name] = plain[name] = tensor.contiguous()
            continue
        data, scale = quantized(tensor.float(), rows)
        stored |= {name: data, f"{name}_scale": scale.reshape(1) if scale.numel() == 1 else scale}
        plain[name] = (data.float() * scale).contiguous()
    config = json.loads((source / "config.json").read_text())
    return (
        put(folder / "fp8", stored, {**config, "quantization_config": {"quant_method": "fp8"}}),
        put(folder / "plain", plain, config),
    )


def put(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def meta(name: str) -> nn.Module:
    return mixtures.build(name, meta=True).float()


@pytest.mark.parametrize("rows", [1, None], ids=["row", "tensor"])
@pytest.mark.parametrize("name", RENAMED)
def test_no_key_mapping_is_needed(name: str, rows: int | None, tmp_path: Path) -> None:
    if name not in mixtures.tiny().architectures():
        pytest.skip(f"this transformers has no {name}")
    model = mixtures.build(name)
    model.save_pretrained(tmp_path / "source")
    fp8, plain = checkpoint(tmp_path / "source", tmp_path, rows)
    right = mixtures.dense(type(model).from_pretrained(plain, dtype=torch.float32))
    for dequantize in (True, False):
        own = meta(name)
        load_checkpoint(own, fp8, dequantize=dequantize)
        assert mixtures.differing(mixtures.dense(own), right) == []
    # Rows that were put elsewhere keep their scales; experts of whole files stay FP8.
    stacks = [one for key, one in own.named_parameters() if one.dim() == 3 and "experts" in key and "bias" not in key]
    assert all(isinstance(one, FP8Weight) for one in stacks)
    assert any(isinstance(module, FP8Linear) for module in own.modules())


def test_the_file_names_are_kept_when_a_loaded_model_is_saved(tmp_path: Path) -> None:
    model = mixtures.build("qwen2_5_vl")
    model.save_pretrained(tmp_path / "source")
    fp8, _ = checkpoint(tmp_path / "source", tmp_path, 1)
    own = meta("qwen2_5_vl")
    load_checkpoint(own, fp8)
    save_checkpoint(own, tmp_path / "saved")
    weights = {name for name in load_file(fp8 / "model.safetensors") if not name.endswith("_scale")}
    assert {
        name for name in load_file(tmp_path / "saved" / "model.safetensors") if not name.endswith("_scale")
    } == weights


class Joined(nn.Module):
    """What is three matrices in its files is one here."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 64, bias=False)
        self.out = nn.Linear(32, 32, bias=False)


def test_a_model_of_no_library_is_saved_under_the_names_of_its_file(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, height in (("attn.q", 32), ("attn.k", 16), ("attn.v", 16), ("attn.o", 32)):
        data, scale = quantized(torch.randn(height, 32), 1)
        tensors |= {f"{name}.weight": data, f"{name}.weight_scale": scale}
    folder = put(tmp_path / "file", tensors, {"quantization_config": {"quant_method": "fp8"}})
    mapping = {r"^attn\.q\.": "qkv.", r"^attn\.k\.": "qkv.", r"^attn\.v\.": "qkv.", r"^attn\.o\.": "out."}
    model = Joined()
    load_checkpoint(model, folder, key_mapping=mapping)
    save_checkpoint(model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name].float(), tensors[name].float()) for name in tensors)
    again = Joined()
    load_checkpoint(again, tmp_path / "saved", key_mapping=mapping)
    assert torch.equal(again.qkv.weight.dequantize(), model.qkv.weight.dequantize())


@pytest.mark.parametrize("name", ["llama4_text", "gpt_oss"])
def test_single_experts_are_turned_into_transposed_stacks_in_fp8(name: str, tmp_path: Path) -> None:
    """llm-compressor writes a matrix for each expert; these models have ``[E, K, N]``, GPT-OSS gate and up in turn."""
    model = mixtures.build(name)
    tensors = {key: value.contiguous() for key, value in model.float().state_dict().items()}
    right = dict(tensors)
    for key in [key for key in tensors if key.endswith("experts.gate_up_proj")]:
        block = key.removesuffix("gate_up_proj")
        both, down = tensors.pop(key).mT, tensors.pop(f"{block}down_proj").mT
        half = both.shape[1] // 2
        gate, up = (both[:, 0::2], both[:, 1::2]) if name == "gpt_oss" else (both[:, :half], both[:, half:])
        for part, stack in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            for index, expert in enumerate(stack):
                data, scale = quantized(expert, 1)
                tensors |= {f"{block}{index}.{part}.weight": data, f"{block}{index}.{part}.weight_scale": scale}
                expert.copy_(data.float() * scale)  # in place: also in what is right
        assert right[key].data_ptr() == both.data_ptr()
    folder = put(tmp_path / "file", tensors, {"quantization_config": {"quant_method": "fp8"}})
    for dequantize in (True, False):
        own = meta(name)
        load_checkpoint(own, folder, dequantize=dequantize)
        found = {key: value.float() for key, value in mixtures.dense(own).items()}
        wanted = {key: value.to(torch.bfloat16).float() for key, value in right.items() if key in found}
        assert mixtures.differing(found, wanted) == []
        experts = [
            one for key, one in own.named_parameters() if key.endswith(("experts.gate_up_proj", "experts.down_proj"))
        ]
        assert all(isinstance(one, FP8Weight) is not dequantize for one in experts)


def test_what_computes_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Halve(ConversionOps):
        def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
            return {target_patterns[0]: next(iter(input_dict.values()))[0] / 2}

    class Odd(transformers.LlamaForCausalLM):
        pass

    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    monkeypatch.setitem(
        conversion_mapping._checkpoint_conversion_mapping_cache,
        "Odd",
        [WeightConverter(r"mlp\.up\.weight", "mlp.up_proj.weight", operations=[Halve()])],
    )
    monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", {"Odd"})
    config = mixtures.config_of("llama")
    tensors = {
        name.replace("mlp.up_proj", "mlp.up"): value.contiguous()
        for name, value in Odd(config).state_dict().items()
        if name != "lm_head.weight" or not config.tie_word_embeddings
    }
    name = next(name for name in tensors if name.endswith("mlp.up.weight"))
    data, scale = quantized(tensors[name], 1)
    folder = put(
        tmp_path / "file",
        {**tensors, name: data, f"{name}_scale": scale},
        {"quantization_config": {"quant_method": "fp8"}},
    )
    with torch.device("meta"):
        model = Odd(config)
    with pytest.raises(UnsupportedError, match=rf"{name}.*Halve"):
        load_checkpoint(model, folder)
    load_checkpoint(model, folder, dequantize=True)
    assert torch.equal(model.get_parameter(name.replace("mlp.up", "mlp.up_proj")), data.float() * scale / 2)


def test_fp4_experts_are_refused_by_name(tmp_path: Path) -> None:
    model = mixtures.build("deepseek_v4")
    save_checkpoint(model, tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    names = [name for name in tensors if ".experts." in name and name.endswith(".weight")]
    for name in names:
        rows, columns = tensors[name].shape
        tensors[name] = torch.zeros(rows, columns // 2, dtype=torch.int8)
        tensors[name.removesuffix("weight") + "scale"] = torch.full((rows, columns // 32), 127, dtype=torch.uint8).view(
            torch.float8_e8m0fnu
        )
    folder = put(tmp_path / "fp4", tensors, {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"}})
    with pytest.raises(CheckpointError, match="FP4"):
        load_checkpoint(meta("deepseek_v4"), folder)


@pytest.mark.parametrize("name", ["llava", "paligemma", "clip", "siglip", "chinese_clip", "falcon_h1", "kimi_k25"])
def test_buffers_of_towers_are_computed_by_the_towers(name: str) -> None:
    if name not in mixtures.tiny().architectures():
        pytest.skip(f"this transformers has no {name}")
    kind, config = mixtures.tiny().classes(name)[0], mixtures.config_of(name)
    right = kind(config)
    with torch.device("meta"):
        model = kind(config)
    assert initialize_transient(model, torch.device("cpu")) == []
    found, persistent = dict(model.named_buffers()), set(right.state_dict())
    assert any(key not in persistent for key, _ in right.named_buffers())
    for key, buffer in right.named_buffers():
        if key not in persistent:
            torch.testing.assert_close(found[key], buffer)


def test_a_tower_leaves_tensors_with_values_alone() -> None:
    kind, config = mixtures.tiny().classes("clip")[0], mixtures.config_of("clip")
    model = kind(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    embeddings = model.vision_model.embeddings if hasattr(model, "vision_model") else None
    assert embeddings is not None
    embeddings._buffers["position_ids"] = embeddings.position_ids.to("meta")
    assert initialize_transient(model, torch.device("cpu")) == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(hasattr(value, "_is_hf_initialized") for value in model.parameters())
