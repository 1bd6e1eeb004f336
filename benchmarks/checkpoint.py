"""Speed of reading, loading and making checkpoints, compared with ``safetensors.torch.load_file`` in the same run.

    python benchmarks/checkpoint.py [--megabytes 512] [--save]

GB/s refer to bytes on disk, for files in the page cache. ``load_file`` maps the file and reads nothing until a tensor
is accessed: its row clones every tensor, as a model that outlives the file has to.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from harness import paired_seconds, save, table, wall_seconds
from safetensors.torch import load_file, save_file
from torch import nn

from fp8gemm import FP8GemmOptions, dequantize
from fp8gemm.checkpoint import convert_checkpoint, load_checkpoint, open_checkpoint, quantize_checkpoint

SIDE = 4096
PEAK = """
import sys, threading, torch
from torch import nn
from fp8gemm import FP8GemmOptions
from fp8gemm.checkpoint import load_checkpoint
def now():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16) for _ in range(int(sys.argv[2]))))
base = peak = now()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, now())
thread = threading.Thread(target=watch, daemon=True); thread.start()
load_checkpoint(model, sys.argv[1], options=FP8GemmOptions(engine="reference"), dequantize=sys.argv[3] == "dense")
done.set(); thread.join()
print(max(peak, now()) - base)
"""


def model_of(count: int) -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16) for _ in range(count)))


def check(dense: Path, fp8: Path, count: int) -> None:
    """Checks that the timed functions return the right values."""
    model = model_of(count)
    load_checkpoint(model, fp8, dequantize=True)
    checkpoint = open_checkpoint(fp8)
    for name, original in load_file(dense / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), checkpoint.dequantize(name, torch.bfloat16))
        error = (checkpoint.dequantize(name) - original.float()).norm() / original.float().norm()
        assert error < 0.03, error  # e4m3 keeps 3 bits: at most 2**-4 / sqrt(3) for uniformly distributed values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512, help="of the bfloat16 checkpoint")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cpu_checkpoint.json")
    arguments = parser.parse_args()
    count = max(1, arguments.megabytes * 10**6 // (2 * SIDE * SIDE))
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary:
        dense, fp8 = Path(temporary) / "dense", Path(temporary) / "fp8"
        dense.mkdir()
        generator = torch.Generator().manual_seed(0)
        tensors = {f"{i}.weight": torch.randn(SIDE, SIDE, generator=generator).bfloat16() for i in range(count)}
        save_file(tensors, dense / "model.safetensors")
        del tensors
        made = (Path(temporary) / f"fp8{'-again' * turn}" for turn in (0, 1))
        seconds = min(wall_seconds(partial(quantize_checkpoint, dense, folder)) for folder in made)
        check(dense, fp8, count)
        plain = FP8GemmOptions(engine="reference")
        timed = paired_seconds(
            {
                "load_file, cloned": lambda: [t.clone() for t in load_file(fp8 / "model.safetensors").values()],
                "open_checkpoint": lambda: open_checkpoint(fp8),
                "load_checkpoint, FP8": lambda: load_checkpoint(model_of(count), fp8, options=plain),
                "load_checkpoint, dequantized to bfloat16": lambda: load_checkpoint(
                    model_of(count), fp8, dequantize=True
                ),
                "dequantize alone": lambda: [
                    dequantize(value, torch.bfloat16)  # type: ignore[arg-type]
                    for value in open_checkpoint(fp8).values()
                ],
            },
            seconds=20.0,
            least=3,
        )
        small, large = (path.joinpath("model.safetensors").stat().st_size for path in (fp8, dense))
        for name, median in timed.items():
            rows.append({"what": name, "seconds": median, "GB/s": small / median / 1e9})
        rows.append({"what": "quantize_checkpoint, rows", "seconds": seconds, "GB/s": large / seconds / 1e9})
        converted = wall_seconds(partial(convert_checkpoint, fp8, Path(temporary) / "converted"))
        rows.append({"what": "convert_checkpoint", "seconds": converted, "GB/s": small / converted / 1e9})
        for kind, size in (("fp8", small), ("dense", large)):
            ran = subprocess.run(
                [sys.executable, "-c", PEAK, str(fp8), str(count), kind], capture_output=True, text=True, check=True
            )
            rows.append({"what": f"peak memory loading, {kind}", "MB": int(ran.stdout) / 1e6, "model MB": size / 1e6})
    print(table(rows, ["what", "seconds", "GB/s", "MB", "model MB"]))
    if arguments.save:
        print(save("cpu_checkpoint", rows, megabytes=arguments.megabytes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
