"""The example of calibration: rounding pays on sentences like those it was given, and static scales cost little."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_what_the_example_prints() -> None:
    command = [sys.executable, "examples/calibrate.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    none, scales, rounding, dynamic, static = map(float, re.findall(r"cosine distance (\d\.\d+)", done.stdout))
    assert rounding < 0.8 * none, done.stdout
    assert scales < 1.1 * none, done.stdout
    assert static < 1.5 * dynamic, done.stdout
    assert done.stdout.splitlines()[-1].startswith("0 of ")
