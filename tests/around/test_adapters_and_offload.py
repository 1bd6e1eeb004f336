"""peft's adapters on patched models, and accelerate's offloading of them.

Not part of the ordinary run: ``pip install peft accelerate transformers``, then ``pytest tests/around``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fp8gemm import FP8GemmOptions, FP8Linear, UnsupportedError, disable_fp8_gemm, enable_fp8_gemm, report
from fp8gemm.weights import FP8Weight

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("default")

STORAGES = ("keep", "cpu_offload", "discard")
IDS = torch.arange(18).view(2, 9) % 64
CPU = torch.device("cpu")


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return transformers.LlamaForCausalLM(config)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("patched_first", [True, False])
def test_lora_attaches_trains_merges_and_unmerges(storage: Any, patched_first: bool) -> None:
    options = FP8GemmOptions(fp16_weight_storage=storage)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model = llama()
    if patched_first:
        enable_fp8_gemm(model, options=options)
        model = peft.get_peft_model(model, adapters)
    else:
        model = peft.get_peft_model(model, adapters)
        enable_fp8_gemm(model, options=options)
    bases = [module for module in model.modules() if isinstance(module, FP8Linear)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [base.scaled().data.clone() for base in bases]
    optimizer = torch.optim.Adam(trained, 3e-3)
    losses = []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    same = (base.scaled().data.view(torch.uint8).equal(old.view(torch.uint8)) for base, old in zip(bases, before))  # noqa: B905
    assert all(same), "training changed a frozen weight"
    model.eval()
    with torch.no_grad():
        y = model(IDS).logits
        model.merge_adapter()
        assert error(model(IDS).logits, y) <= 0.08
        model.unmerge_adapter()
        assert error(model(IDS).logits, y) <= (1e-5 if storage != "discard" else 0.12)
        merged = model.merge_and_unload()
        assert isinstance(merged.model.layers[0].self_attn.q_proj, FP8Linear)
        assert error(merged(IDS).logits, y) <= 0.12


# --- every kind of adapter, against a dense twin with the same values ------------------------------------------------

TARGETS = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "PiSSA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
    "OLoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=TARGETS),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=TARGETS),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=TARGETS[:2]),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=50, target_modules=TARGETS),
    "MiSS": lambda: peft.MissConfig(r=8, target_modules=TARGETS),
    "SHiRA": lambda: peft.ShiraConfig(r=4, target_modules=TARGETS),
    "RoAd": lambda: peft.RoadConfig(target_modules=TARGETS),
}
ROUNDED = 2**-4  # at most half a step of three bits of mantissa, relative to a value


def life(model: nn.Module, adapters: Any, safe: bool) -> tuple[dict[str, torch.Tensor], Any]:
    """What a model says at each station of an adapter's life, and what is left of it."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, adapters).eval()
    said = {"attached": adapted(IDS).logits}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.3)
    for _ in range(4):
        adapted(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        said["trained"] = adapted(IDS).logits
        adapted.merge_adapter(safe_merge=safe)
        said["merged"] = adapted(IDS).logits
        adapted.unmerge_adapter()
        said["unmerged"] = adapted(IDS).logits
        left = adapted.merge_and_unload(safe_merge=safe)
        said["unloaded"] = left(IDS).logits
    return said, left


def dequantized(model: Any) -> Any:
    """A dense model with the values of the FP8 one."""
    return disable_fp8_gemm(enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage="discard")))[0]


@pytest.mark.parametrize(("storage", "safe"), [("keep", False), ("discard", True)])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_does_what_it_does_to_the_dense_twin(name: str, storage: Any, safe: bool) -> None:
    twin = dequantized(llama())
    if (name, storage) == ("HRA", "keep"):  # its forward multiplies by the data of a weight: the original
        for key, parameter in llama().named_parameters():
            if any(target in key for target in TARGETS):
                twin.get_parameter(key).data.copy_(parameter.data)
    expected, dense = life(twin, ADAPTERS[name](), safe)
    model = enable_fp8_gemm(llama(), options=FP8GemmOptions(fp16_weight_storage=storage))
    said, left = life(model, ADAPTERS[name](), safe)
    assert error(expected["trained"], expected["attached"]) > 2e-3, "the adapter learns nothing"
    # The first two take what they train out of the weight, which rounds the rest; the third adds to a copy of the
    # weight, which is one of the original where that is kept.
    writes_at_once = name in ("PiSSA", "OLoRA", "SHiRA")
    for station in ("attached", "trained"):
        assert error(said[station], expected[station]) < (ROUNDED if writes_at_once else 1e-4), station
    for station in ("merged", "unmerged", "unloaded"):
        assert error(said[station], expected[station]) < ROUNDED, station
    ours = [(key, module) for key, module in left.named_modules() if isinstance(module, FP8Linear)]
    assert len(ours) == 15
    for key, module in ours:
        w = dense.get_submodule(key).weight
        assert error(module.weight.dequantize(), w) < ROUNDED, key


def experts_of(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts_per_tok": 2,
    }
    if kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(**sizes, intermediate_size=96, num_experts=4, moe_intermediate_size=64)
    else:
        config = transformers.GptOssConfig(**sizes, intermediate_size=64, num_local_experts=4)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("storage", ["keep", "discard"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_lora_on_the_parameters_of_experts(kind: str, implementation: str, storage: Any) -> None:
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

    def adapters() -> Any:
        return peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=stacks, init_lora_weights=False)

    twin, model = dequantized(experts_of(kind)), experts_of(kind)
    enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage=storage))
    kinds = {type(module) for module in model.modules()}
    for one in (twin, model):
        one.set_experts_implementation(implementation)
    expected, dense = life(twin, adapters(), safe=False)
    said, left = life(model, adapters(), safe=False)
    for station in ("attached", "trained"):
        assert error(said[station], expected[station]) < 1e-4, station
    assert error(said["unmerged"], expected["unmerged"]) < 0.15  # rounding may choose another expert for a token
    for name, parameter in left.named_parameters():
        if isinstance(parameter, FP8Weight):
            assert error(parameter.dequantize(), dense.get_parameter(name)) < ROUNDED, name
    assert {type(module) for module in left.modules()} == kinds
    assert sum(isinstance(parameter, FP8Weight) for parameter in left.parameters()) == 13


def test_adapters_that_were_there_before_patching_train_on() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    enable_fp8_gemm(model)
    assert len(report(model).converted) == 15  # the head that is set aside too
    assert all("it is an adapter of " in row.reason for row in report(model).kept if "lora_" in row.name)
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in trained.items():
        assert model.get_parameter(name) is parameter
        assert parameter.grad is not None, name


def test_training_the_weight_itself_is_refused() -> None:
    adapters = peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"])
    with pytest.raises(UnsupportedError, match=r"takes no gradient: train adapters beside it \(LoRA\)"):
        peft.get_peft_model(enable_fp8_gemm(llama()), adapters)


# --- accelerate ------------------------------------------------------------------------------------------------------


def _all_to_cpu(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


def _all_to_disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device=CPU)


def _dispatched(model: nn.Module, folder: Path) -> None:
    accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)


def _head_to_disk(model: nn.Module, folder: Path) -> None:
    devices = {"model": "cpu", "lm_head": "disk"}
    accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=str(folder))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "qwen3_moe": lambda: experts_of("qwen3_moe"),
    "gpt_oss": lambda: experts_of("gpt_oss"),
}


@torch.no_grad()
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("offload", [_all_to_cpu, _dispatched], ids=lambda value: value.__name__.strip("_"))
def test_offloading_a_patched_model(offload: Callable[..., None], kind: str, storage: Any, tmp_path: Path) -> None:
    """Bytes go out and come in, nothing is dequantized, and the report goes on counting."""
    model = enable_fp8_gemm(MODELS[kind]().eval(), options=FP8GemmOptions(fp16_weight_storage=storage))
    expected = model(IDS).logits
    before = sum(row.calls for row in report(model).converted)
    offload(model, tmp_path)
    assert offload is _dispatched or all(parameter.is_meta for parameter in model.parameters())
    for _ in range(3):
        assert model(IDS).logits.equal(expected)
    rows = report(model).converted
    assert sum(row.calls for row in rows) == 4 * before
    assert all(row.dequantizations == 0 for row in rows)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model(IDS).logits.equal(expected)


@torch.no_grad()
@pytest.mark.parametrize("offload", [_all_to_disk, _head_to_disk])
def test_offloading_to_disk_is_refused(offload: Callable[..., None], tmp_path: Path) -> None:
    """accelerate writes the bytes, and would read them back as values without their scales."""
    model = enable_fp8_gemm(llama().eval())
    expected = model(IDS).logits
    with pytest.raises(UnsupportedError, match=r"accelerate\.disk_offload .* use accelerate\.cpu_offload"):
        offload(model, tmp_path)
    assert model(IDS).logits.equal(expected)
    assert not (tmp_path / "index.json").exists()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_tensor_set_by_accelerate(dtype: torch.dtype | None) -> None:
    """A patched model takes the bytes of an entry, a dense one its values; a patched one also takes dense values."""
    source = enable_fp8_gemm(llama(), options=FP8GemmOptions(fp16_weight_storage="discard"))
    patched, plain = enable_fp8_gemm(llama()), llama()
    name = "model.layers.0.mlp.up_proj.weight"
    entry, weight = source.state_dict()[name], source.get_parameter(name)
    values = weight.to(dtype or torch.float32).dequantize()
    for model in (patched, plain):
        model.get_parameter(name).zero_()
        accelerate.utils.set_module_tensor_to_device(model, name, "cpu", value=entry, dtype=dtype)
    found, dense = patched.get_parameter(name), plain.get_parameter(name)
    assert isinstance(found, FP8Weight)
    assert found.scaled().data.view(torch.uint8).equal(weight.scaled().data.view(torch.uint8))
    assert type(dense) is nn.Parameter
    assert torch.equal(dense, values)
    accelerate.utils.set_module_tensor_to_device(patched, name, "cpu", value=values, dtype=dtype)
    assert torch.equal(patched.get_parameter(name).float(), values.float())


@torch.no_grad()
@pytest.mark.parametrize("offload", [_all_to_cpu, _all_to_disk])
def test_what_is_offloaded_already_is_not_converted_by_halves(offload: Callable[..., None], tmp_path: Path) -> None:
    model = llama().eval()
    offload(model, tmp_path)
    with pytest.raises(
        ValueError, match="its weight is offloaded by accelerate: patch the model before it is offloaded"
    ):
        enable_fp8_gemm(model)
    assert not any(isinstance(module, FP8Linear) for module in model.modules())
