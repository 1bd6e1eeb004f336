"""Patching a Llama-like stack of 1.1 billion parameters made on the spot: seconds, peak and final memory.

    python benchmarks/patching.py [--save NAME]

Memory is the process's anonymous memory (RssAnon), whose peak is sampled every 5 ms. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from harness import save, table, wall_seconds
from torch import nn

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, report

WIDTH, HIDDEN, LAYERS, VOCABULARY = 2048, 5632, 22, 32000  # TinyLlama-1.1B's, with 4 key-value heads of 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", help="write benchmarks/results/SAVE.json")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(mp_context=get_context("spawn"), max_tasks_per_child=1, max_workers=1) as fresh:
        rows = list(fresh.map(measure, ["discard", "keep"]))
    print(table(rows, list(rows[0])))
    if arguments.save:
        print(save(arguments.save, rows))


def measure(storage: str) -> dict[str, object]:
    enable_fp8_gemm(nn.Linear(64, 64, dtype=torch.bfloat16))  # memory of modules that are loaded once does not count
    start = anonymous()
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(VOCABULARY, WIDTH, dtype=torch.bfloat16),
            "layers": nn.ModuleList(block() for _ in range(LAYERS)),
            "head": nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.bfloat16),
        }
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dense = anonymous() - start
    with Peak() as peak:
        options = FP8GemmOptions(fp16_weight_storage=storage)
        seconds = wall_seconds(lambda: enable_fp8_gemm(model, options=options))
    gc.collect()
    end = anonymous() - start
    counted = report(model)
    return {
        "storage": storage,
        "parameters": parameters,
        "seconds": seconds,
        "dense MB": dense / 1e6,
        "peak of dense": (peak.value - start) / dense,
        "end of dense": end / dense,
        "weights of dense": counted.bytes_after / counted.bytes_before,
    }


def block() -> nn.ModuleDict:
    sizes = {
        "q": (WIDTH, WIDTH),
        "k": (WIDTH, WIDTH // 8),
        "v": (WIDTH, WIDTH // 8),
        "o": (WIDTH, WIDTH),
        "gate": (WIDTH, HIDDEN),
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }
    return nn.ModuleDict({name: nn.Linear(*size, bias=False, dtype=torch.bfloat16) for name, size in sizes.items()})


def anonymous() -> int:
    """Bytes of memory that belong to this process alone and not to a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel does not tell RssAnon in /proc/self/status")


class Peak:
    """The peak of anonymous memory while a block runs, sampled by a thread."""

    def __enter__(self) -> Peak:
        self.value, self.running = anonymous(), True
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self) -> None:
        while self.running:
            self.value = max(self.value, anonymous())
            time.sleep(0.005)

    def __exit__(self, *exception: object) -> None:
        self.running = False
        self.thread.join()


if __name__ == "__main__":
    main()
