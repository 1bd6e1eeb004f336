"""Transformers' own tensor and expert parallelism, as `torchrun` starts it, and FP8 checkpoints into its shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import Case, Cases, Rank
from transformers.distributed import DistributedConfig

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, load_checkpoint, report, save_checkpoint
from fp8gemm.weights import FP8Weight

cases = Cases("transformers: tp_plan and ep_plan")
Model = transformers.PreTrainedModel


def llama(**more: Any) -> Model:
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=128,
        tie_word_embeddings=False,
        **more,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def mixture() -> Model:
    config = transformers.Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size=128,
        num_experts=8,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config).eval()


def ids(rank: Rank) -> torch.Tensor:
    return (torch.arange(2 * 7, device=rank.device).view(2, 7) * 11) % 128


def logits(model: Model, rank: Rank) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids(rank)).logits


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-3) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm(), (found - expected).norm() / expected.norm()


def loaded(rank: Rank, model: Model, **options: Any) -> Model:
    """The model, saved and loaded again by transformers as shards."""
    if rank.number == 0:
        model.save_pretrained(rank.folder)
    dist.barrier()
    config = DistributedConfig(**options)
    return type(model).from_pretrained(rank.folder, distributed_config=config).eval()


def shards(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.to_local() for name, p in model.named_parameters() if hasattr(p, "to_local")}


def check(rank: Rank, model: Model, one: Model) -> None:
    """Shards of the matrices are FP8, and the logits are those of one process."""
    expected = logits(one.to(rank.device), rank)
    close(logits(model, rank), expected)
    fp8 = {row.name for row in report(one).converted}
    assert {row.name for row in report(model).converted} == fp8
    for name, local in shards(model).items():
        layer = name.removesuffix(".weight")
        assert isinstance(local, FP8Weight) == (layer in fp8), name
        if isinstance(local, FP8Weight):
            whole = dict(one.named_parameters())[name]
            assert local.scaled().data.nbytes * rank.world == whole.scaled().data.nbytes, name
            assert local.activity.dequantizations == 0, name


@cases.works("tp_plan='auto', then patched")
def _(rank: Rank) -> None:
    for scheme in ("row", "block") if rank.world == 2 else ("row",):
        options = FP8GemmOptions(scheme=scheme)
        model = loaded(rank, llama(), tp_plan="auto")
        check(rank, enable_fp8_gemm(model, options=options), enable_fp8_gemm(llama(), options=options))


@cases.works("experts under tp_plan='auto', then patched")
def _(rank: Rank) -> None:
    check(rank, enable_fp8_gemm(loaded(rank, mixture(), tp_plan="auto")), enable_fp8_gemm(mixture()))


@cases.works("ep_size, then patched")
def _(rank: Rank) -> None:
    model = loaded(rank, mixture(), tp_size=rank.world, ep_size=rank.world)
    close(logits(enable_fp8_gemm(model), rank), logits(enable_fp8_gemm(mixture()).to(rank.device), rank))
    local = model.model.layers[0].mlp.experts.gate_up_proj.to_local()
    assert isinstance(local, FP8Weight)
    assert local.shape[0] == 8 // rank.world


@cases.works("patched, then split by the plan")
def _(rank: Rank) -> None:
    for make in (llama, mixture):
        model = enable_fp8_gemm(make()).to(rank.device)
        split(rank, model)
        check(rank, model, enable_fp8_gemm(make()))


def split(rank: Rank, model: Model) -> Model:
    config, _, meshes = type(model).prepare_distribute_model(DistributedConfig(tp_size=rank.world))
    return type(model).maybe_distribute_model(model, config, meshes)


@cases.works("an FP8 checkpoint straight into shards of a model on meta")
def _(rank: Rank) -> None:
    for make in (llama, mixture):
        folder = rank.folder / make.__name__
        if rank.number == 0:
            save_checkpoint(enable_fp8_gemm(make()), folder)
        dist.barrier()
        one = make()
        load_checkpoint(one, folder)
        with torch.device("meta"):
            model = make()
        split(rank, model)
        found = load_checkpoint(model, folder, device=rank.device)
        assert {row.name for row in found.converted} == {row.name for row in report(one).converted}
        check(rank, model, one)


@cases.works("generate")
def _(rank: Rank) -> None:
    model, one = enable_fp8_gemm(loaded(rank, llama(), tp_plan="auto")), enable_fp8_gemm(llama()).to(rank.device)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ids(rank), **settings).equal(one.generate(ids(rank), **settings))


@cases.works("save_pretrained and save_checkpoint of split models")
def _(rank: Rank) -> None:
    for make in (llama, mixture):
        one = enable_fp8_gemm(make())
        model = split(rank, enable_fp8_gemm(make()).to(rank.device))
        model.save_pretrained(rank.folder / make.__name__)
        assert "distributed_config" not in (rank.folder / make.__name__ / "config.json").read_text()
        again = make()
        load_checkpoint(again, rank.folder / make.__name__)
        close(logits(again.to(rank.device), rank), logits(one.to(rank.device), rank), 1e-6)


@pytest.mark.parametrize("case", cases.all(), ids=str)
def test_transformers_parallel(case: Case, world: int, backend: str) -> None:
    case.check(world, backend)
