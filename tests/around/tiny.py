"""Small random models for the trials, and how far two answers are apart."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import transformers
from torch import nn

from fp8gemm import FP8GemmOptions, FP8Weight, disable_fp8_gemm, enable_fp8_gemm

Model = TypeVar("Model", bound=nn.Module)

IDS = torch.arange(18).view(2, 9) % 60 + 3
DISCARD = FP8GemmOptions(fp16_weight_storage="discard")
KEEP = FP8GemmOptions(fp16_weight_storage="keep")


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes})).to(dtype).eval()


def mixture() -> Any:
    """Two layers of four experts each."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def bert(**changes: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
        **changes,
    )


def tokenizer() -> Any:
    """One token for each letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: 3 + i for i, letter in enumerate("abcdefghijklmno ")}}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def patched(model: Model, options: FP8GemmOptions | None = None) -> Model:
    return enable_fp8_gemm(copy.deepcopy(model), options=options)


def dequantized(model: Model) -> Model:
    """A dense model with the values of the FP8 one, which ``model`` is or will be."""
    fp8 = any(isinstance(parameter, FP8Weight) for parameter in model.parameters())
    return disable_fp8_gemm(copy.deepcopy(model) if fp8 else patched(model, DISCARD))[0]


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance relative to ``expected``."""
    return ((y.float() - expected.float()).norm() / expected.float().norm()).item()


def is_fp8(model: nn.Module, count: int) -> bool:
    return sum(isinstance(parameter, FP8Weight) for parameter in model.parameters()) == count
