"""The README is true: its Python runs, its commands and files exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_python_blocks_run_in_order() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    subprocess.run([sys.executable, "-c", "\n".join(blocks)], check=True, cwd=ROOT)


def test_files_that_it_names_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    scripts = re.findall(r"python ((?:examples|benchmarks)/\w+\.py)", TEXT)
    assert links
    assert scripts
    for name in [*links, *scripts]:
        assert (ROOT / name).exists(), name


def test_quickstart_gives_the_same_neighbours() -> None:
    """Real weights, real sentences: the example checks cosine similarity and ranking, and exits with 1 if not."""
    done = subprocess.run(
        [sys.executable, "examples/quickstart.py", "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"nearest_neighbours_unchanged": true' in done.stdout
