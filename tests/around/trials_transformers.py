"""transformers: generation, pipelines, Trainer, and folders of ours that transformers loads itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
import transformers
from compatibility import Trial
from tiny import DISCARD, IDS, bert, dequantized, error, is_fp8, llama, mixture, patched, tokenizer

from fp8gemm import FP8GemmOptions, FP8Weight, enable_fp8_gemm

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def generates_with(cache: str) -> None:
    model = patched(llama())
    assert model.generate(IDS, **GREEDY, cache_implementation=cache).equal(model.generate(IDS, **GREEDY))


def assisted() -> None:
    model, assistant = patched(llama()), patched(llama(num_hidden_layers=1))
    expected = model.generate(IDS[:1], **GREEDY)
    assert model.generate(IDS[:1], assistant_model=assistant, **GREEDY).equal(expected)
    assert model.generate(IDS[:1], prompt_lookup_num_tokens=2, **GREEDY).equal(expected)
    assert expected.equal(dequantized(llama()).generate(IDS[:1], **GREEDY))


def pipelines() -> None:
    for task, asked in (("text-generation", GREEDY), ("feature-extraction", {})):
        found, expected = (
            transformers.pipeline(task, model=one if asked else one.model, tokenizer=tokenizer())(
                "cab of a knee", **asked
            )
            for one in (patched(llama(), FP8GemmOptions(scheme="weight_only")), dequantized(llama()))
        )
        if asked:
            assert found == expected
        else:
            assert error(torch.tensor(found), torch.tensor(expected)) < 1e-5


def _trainer(model: Any, folder: str, **changes: Any) -> transformers.Trainer:
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        folder, use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-2, num_train_epochs=2, **changes
    )
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def trainer_with_adapters() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(patched(llama()), config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, folder, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True)
        trainer.args.gradient_checkpointing = True
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before
        trainer.save_model(f"{folder}/last")
        again = peft.PeftModel.from_pretrained(patched(llama()), f"{folder}/last").eval()
    assert again(IDS).logits.equal(model.eval()(IDS).logits)


def trainer_without() -> None:
    model = patched(llama())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        _trainer(model, folder, save_strategy="no").train()
    for name, parameter in model.named_parameters():
        fp8, left = isinstance(parameter, FP8Weight), torch.equal(parameter, before[name])
        assert left if fp8 else (not left or not parameter.requires_grad), name


@torch.no_grad()
def loaded_by_itself(make: Callable[[], Any], scheme: Any, dtype: torch.dtype) -> None:
    model = patched(make().to(dtype), FP8GemmOptions(scheme=scheme, fp16_weight_storage="discard"))
    expected = dequantized(model)(IDS).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded, told = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    # A 16-bit weight is rounded once by us, in float32; transformers multiplies in 16 bits.
    assert error(loaded(IDS).logits, expected) <= {torch.float32: 0, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    assert is_fp8(enable_fp8_gemm(loaded), len([1 for p in model.parameters() if isinstance(p, FP8Weight)]))


@torch.no_grad()
def without_a_head() -> None:
    model = patched(llama(), DISCARD)
    expected = dequantized(model).model(IDS)[0]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded, told = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert told["unexpected_keys"] == {"lm_head.weight"}
    assert loaded(IDS)[0].equal(expected)


@torch.no_grad()
def with_another_head() -> None:
    """What a folder lacks is initialized, dense."""
    with tempfile.TemporaryDirectory() as folder:
        patched(llama(), DISCARD).model.save_pretrained(folder)
        for kind, head in (("CausalLM", "lm_head"), ("SequenceClassification", "score")):
            auto = getattr(transformers, f"AutoModelFor{kind}")
            loaded, told = auto.from_pretrained(folder, output_loading_info=True)
            assert told["missing_keys"] == {f"{head}.weight"}
            assert loaded.model(IDS)[0].equal(dequantized(llama()).model(IDS)[0])
    with tempfile.TemporaryDirectory() as folder:
        model = patched(transformers.BertForMaskedLM(bert()).eval(), DISCARD)
        model.save_pretrained(folder)
        loaded = transformers.AutoModel.from_pretrained(folder)  # with a pooler
    assert loaded(IDS)[0].equal(dequantized(model).bert(IDS)[0])


def counted() -> None:
    for make in (llama, partial(llama, tie_word_embeddings=True), mixture):
        dense = make()
        for storage in ("keep", "discard"):
            model = patched(dense, FP8GemmOptions(fp16_weight_storage=storage))  # type: ignore[arg-type]
            for asked in ({}, {"exclude_embeddings": True}):
                assert model.num_parameters(**asked) == dense.num_parameters(**asked)
            assert (model.get_memory_footprint() < dense.get_memory_footprint()) == (storage == "discard")


def _trial(what: str, run: Callable[[], object], note: str = "") -> Trial:
    return Trial(library="transformers", what=what, run=run, note=note)


TRIALS = [
    *(
        _trial(f"`generate` with a {cache} cache", partial(generates_with, cache))
        for cache in ("dynamic", "static", "sliding_window")
    ),
    _trial("`generate` with an assistant model, and with prompt lookup", assisted),
    _trial("`pipeline`: text generation, feature extraction", pipelines),
    _trial("`Trainer` with LoRA, gradient checkpointing and the best checkpoint at the end", trainer_with_adapters),
    _trial("`Trainer` without adapters", trainer_without, "trains embeddings, norms and biases; FP8 weights stay"),
    *(
        _trial(
            f"`save_pretrained`, `from_pretrained` by transformers itself: {name}, scheme {scheme}, {str(dtype)[6:]}",
            partial(loaded_by_itself, make, scheme, dtype),
            "dense, with the values that FP8 holds",
        )
        for name, make in {"Llama": llama, "Qwen3-MoE": mixture}.items()
        for scheme, dtype in (("row", torch.float32), ("tensor", torch.bfloat16), ("weight_only", torch.float16))
    ),
    _trial("`AutoModel`, without a head, from a folder with one", without_a_head),
    _trial("a class with another head than the folder", with_another_head, "the head is initialized, dense"),
    _trial("`num_parameters`, `get_memory_footprint`", counted, "as of the dense model; bytes as they are held"),
]
