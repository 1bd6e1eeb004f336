"""The example of tensor parallelism, as its first lines say to run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "tensor_parallel.py"


def test_it_runs_on_two_processes() -> None:
    command = re.search(r"^torchrun (--nproc-per-node 2) examples/tensor_parallel\.py$", EXAMPLE.read_text(), re.M)
    assert command is not None
    run = [sys.executable, "-m", "torch.distributed.run", *command[1].split(), str(EXAMPLE)]
    told = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert told.returncode == 0, told.stderr
    found = re.search(r"rank 0 of 2: (\d+) of (\d+) bytes in FP8, relative error of the logits (\S+)", told.stdout)
    assert found is not None, told.stdout
    assert int(found[2]) / 2 <= int(found[1]) < 0.51 * int(found[2])  # the ranks have some scales in common
    assert float(found[3]) < 1e-5
