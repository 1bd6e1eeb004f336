"""The example runs: an estimate of a sentence encoder with real weights, and the bytes that patching it then gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_estimates_and_patches(tmp_path: Path) -> None:
    command = [sys.executable, "examples/estimate.py", "--html", str(tmp_path / "page.html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "weights: 37 to convert, 0 kept dense, 43.06 MB -> 10.85 MB" in done.stdout
    assert "bytes as estimated: True" in done.stdout
    assert "encoder" in (tmp_path / "page.html").read_text()
