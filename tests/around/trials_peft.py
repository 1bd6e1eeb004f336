"""peft: every kind of adapter on a patched model, merged and unmerged; rules for the order; training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from compatibility import Trial
from tiny import DISCARD, IDS, KEEP, dequantized, error, mixture, patched
from tiny import llama as whole_llama
from torch import nn

from fp8gemm import FP8Linear, FP8Weight, enable_fp8_gemm, report

TARGETS = ["q_proj", "v_proj", "down_proj"]
Config = Callable[[], Any]
# Without an identity at the start, where a kind has one, so that a merge changes something.
ADAPTERS: dict[str, Config] = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False),
    "LoRA, rank-stabilized": lambda: peft.LoraConfig(
        r=4, target_modules=TARGETS, init_lora_weights=False, use_rslora=True
    ),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "PiSSA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
    "OLoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS, init_weights=False),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS, init_weights=False),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS, init_weights=False),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=TARGETS, init_weights=False),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=TARGETS, init_weights=False),
    "(IA)³": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=TARGETS[:2], init_weights=False),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=50, target_modules=TARGETS, init_weights=False),
    "MiSS": lambda: peft.MissConfig(r=8, target_modules=TARGETS),
    "SHiRA": lambda: peft.ShiraConfig(r=4, target_modules=TARGETS),
    "RoAd": lambda: peft.RoadConfig(target_modules=TARGETS),
}
NEAR = {"DoRA": 3e-2}  # it reads the parameter itself: for norms, and for all in safe merges
STEP = 2**-4  # half a step of three bits of mantissa, relative to a value


def llama(dtype: torch.dtype = torch.float32) -> Any:
    return whole_llama(dtype, num_hidden_layers=1, num_key_value_heads=4)


def adapted(model: nn.Module, config: Config) -> Any:
    """A model with an adapter whose values are the same whatever the model's are."""
    torch.manual_seed(3)
    found = peft.get_peft_model(model, config()).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return found


def bases(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights with adapters: of an FP8 weight the original where that is kept, else what it holds."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.weight", "proj.base_layer.weight")) and any(target in name for target in TARGETS):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if isinstance(parameter, FP8Weight):
                parameter.scaled()
                original = parameter._home.original
                parameter = parameter.dequantize() if original is None else original
            found[name] = parameter.detach().clone()
    return found


@torch.no_grad()
def merges(model: nn.Module, config: Config, safe: bool) -> list[dict[str, torch.Tensor]]:
    """The weights merged, unmerged, and merged for good."""
    one = adapted(model, config)
    one.merge_adapter(safe_merge=safe)
    found = [bases(one)]
    one.unmerge_adapter()
    found.append(bases(one))
    left = one.merge_and_unload(safe_merge=safe)
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in left.modules())
    return [*found, bases(left)]


def exact_where_originals_are_kept(config: Config, near: float = 0.0) -> None:
    """Bit for bit, or within ``near``, relative to each weight."""
    for safe in (False, True):
        model = patched(llama(), KEEP)
        found, expected = merges(model, config, safe), merges(llama(), config, safe)
        assert sum(isinstance(module, FP8Linear) for module in model.modules()) == 8
        for ours, theirs in zip(found, expected, strict=True):
            for name, w in theirs.items():
                assert (ours[name] - w).norm() <= near * w.norm(), name


def rounded_once_where_they_are_not(config: Config) -> None:
    for safe in (False, True):
        found, expected = merges(patched(llama(), DISCARD), config, safe), merges(dequantized(llama()), config, safe)
        for name, w in expected[0].items():
            assert error(found[0][name], w) < STEP, name
        for name, w in expected[2].items():  # once more than the third, and each rounding is of a sum with the adapter
            assert error(found[2][name], w) < 2 * STEP, name


def products(config: Config) -> None:
    """The adapter's own work is dense: outputs differ from the dense twin's by float32 sums only."""
    twin, model = adapted(dequantized(llama()), config), adapted(patched(llama(), DISCARD), config)
    writes_at_once = config()
    rounds = getattr(writes_at_once, "init_lora_weights", None) in ("pissa", "olora") or "SHIRA" in str(
        writes_at_once.peft_type
    )
    assert error(model(IDS).logits, twin(IDS).logits) < (STEP if rounds else 1e-4)


def experts() -> None:
    def config() -> Any:
        stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        return peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=stacks, init_lora_weights=False)

    twin, model = adapted(dequantized(mixture()), config), adapted(patched(mixture(), DISCARD), config)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == [name for name, parameter in twin.named_parameters() if parameter.requires_grad]
    assert sum("experts" in name for name in names) == 8
    assert error(model(IDS).logits, twin(IDS).logits) < 1e-4
    merged, dense = (dict(one.merge_and_unload().named_parameters()) for one in (model, twin))
    stacks = [name for name in merged if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(stacks) == 4
    for name in stacks:
        assert isinstance(merged[name], FP8Weight)
        assert error(merged[name].dequantize(), dense[name]) < STEP


def patched_last() -> None:
    """A rule: adapters stay dense unless a filter names them, and the report says so."""
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(r=16, target_modules=TARGETS, modules_to_save=["lm_head"], init_lora_weights=False)
    )
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    enable_fp8_gemm(model)
    rows = {row.name: row.reason for row in report(model).kept}
    assert sum("lora_" in name for name in rows) == 6
    assert all(reason.startswith("it is an adapter of ") for reason in rows.values())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(model.get_parameter(name) is one and one.grad is not None for name, one in trained.items())


def train(model: Any, steps: int = 40) -> list[float]:
    """LoRA on all layers with gradient checkpointing; the losses of the last steps."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    text = (torch.arange(4096) * 7 + torch.arange(4096) // 5 * 3) % 60 + 3
    losses = []
    for step in range(steps):
        batch = text[(torch.arange(4) * 61 + step * 17).view(-1, 1) % 4000 + torch.arange(16)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fine_tuning() -> None:
    dense, fp8 = train(llama(torch.bfloat16)), train(patched(llama(torch.bfloat16), DISCARD))
    expected, found = sum(dense[-5:]), sum(fp8[-5:])
    assert expected < 0.9 * 5 * dense[0]
    assert abs(found - expected) < 0.02 * expected


def saved_adapters() -> None:
    model = adapted(patched(llama(), DISCARD), ADAPTERS["LoRA"])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(patched(llama(), DISCARD), folder).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def several_adapters() -> None:
    twin, model = (adapted(one, ADAPTERS["LoRA"]) for one in (dequantized(llama()), patched(llama(), DISCARD)))
    for one in (twin, model):
        torch.manual_seed(5)
        one.add_adapter("second", ADAPTERS["LoRA"]())
        one.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type="linear")
    for name in ("second", "both", "default"):
        for one in (twin, model):
            one.set_adapter(name)
        assert error(model(IDS).logits, twin(IDS).logits) < 1e-4
    with model.disable_adapter():
        assert error(model(IDS).logits, dequantized(llama())(IDS).logits) < 1e-4


def training_a_copy_of_the_weight() -> None:
    peft.get_peft_model(patched(llama()), peft.LoraConfig(target_modules=TARGETS, modules_to_save=["lm_head"]))


TRIALS = [
    *(
        Trial(
            library="peft",
            what=f"{name}: merged, unmerged, merged for good, `safe_merge` or not, originals kept",
            run=partial(exact_where_originals_are_kept, config, NEAR.get(name, 0.0)),
            note="every weight is that of the dense model, "
            + (f"within {NEAR[name]:.0e}, as it reads FP8 values" if name in NEAR else "bit for bit"),
        )
        for name, config in ADAPTERS.items()
    ),
    *(
        Trial(
            library="peft",
            what=f"{name}: the same with originals discarded, and outputs before",
            run=partial(lambda one: (products(one), rounded_once_where_they_are_not(one)), config),
            note="merges are those of the dense model, rounded to FP8",
        )
        for name, config in ADAPTERS.items()
    ),
    Trial(library="peft", what="LoRA on stacks of experts (`target_parameters`)", run=experts),
    Trial(
        library="peft",
        what="`enable_fp8_gemm` after `get_peft_model`",
        run=patched_last,
        note="adapters stay dense and train, and the report lists them",
    ),
    Trial(
        library="peft",
        what="`modules_to_save` on a patched model",
        run=training_a_copy_of_the_weight,
        refused="takes no gradient: train adapters beside it (LoRA)",
    ),
    Trial(
        library="peft",
        what="LoRA on all layers of a bfloat16 Llama, with gradient checkpointing",
        run=fine_tuning,
        note="the loss is within 2 % of a bfloat16 base",
    ),
    Trial(library="peft", what="adapters saved and loaded", run=saved_adapters),
    Trial(library="peft", what="several adapters: switched, mixed, disabled", run=several_adapters),
]
