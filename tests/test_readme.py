"""README and docs are true: their Python code runs, README's output is real, and everything they name exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fp8gemm.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FOLDERS = ("docs", "examples")
PAGES = [
    README,
    *sorted(ROOT.glob("C*.md")),
    *(page for name in FOLDERS for page in sorted((ROOT / name).glob("*.md"))),
]
BLOCK = r"```{}\n(.*?)```"
# Scripts of the repository, with the options that follow them.
SCRIPT = re.compile(r"\b((?:examples|benchmarks|tests)/\w+\.py)((?: +[^\s`|]+)*)")
COMMAND = re.compile(r"\bfp8gemm (\w+)((?: +[^\s`|]+)*)")
OPTION = re.compile(r"(?<=\s)--[\w-]+")
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(BLOCK.format(language), text, re.DOTALL)


def run(code: str) -> str:
    """What code prints, in a folder of its own, to which it may write."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, "-c", code], check=True, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        ).stdout


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub generates them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def mistakes(text: str, page: Path) -> list[str]:
    """The files, headings, scripts, commands and options that ``text`` on ``page`` names but that do not exist."""
    found = []
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        file = page.parent / target if target else page
        if not file.exists():
            found.append(f"no file {target}")
        elif anchor and anchor not in slugs(file.read_text()):
            found.append(f"no heading {anchor} in {target}")
    for script, more in SCRIPT.findall(text):
        if not (ROOT / script).exists():
            found.append(f"no script {script}")
        else:
            source = (ROOT / script).read_text()
            found += [
                f"no option {option} of {script}" for option in OPTION.findall(more) if f'"{option}"' not in source
            ]
    source = "".join(file.read_text() for file in (ROOT / "fp8gemm" / "cli").glob("*.py"))
    for command, more in COMMAND.findall("\n".join([*blocks(text, "bash"), *re.findall(r"`(fp8gemm [^`\n]+)`", text)])):
        if command not in COMMANDS:
            found.append(f"no command {command}")
        found += [f"no option {option} of {command}" for option in OPTION.findall(more) if f'"{option}"' not in source]
    return found


def normalized(output: str) -> str:
    """The table without what differs between machines: the engine, its kernels, and the widths of later columns."""
    output = re.sub(r"(?<=  )(native \w+|torch panels|fp8_scaled_mm_cpu)(?= x\d)", "KERNEL", output)
    output = re.sub(r"(?<=\d  )(cpu|vllm)(?= )", "ENGINE", output)
    return "\n".join(" ".join(line.split()) for line in output.strip().splitlines())


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.name
)
def test_python_blocks_run_in_order(page: Path) -> None:
    run("\n".join(blocks(page.read_text(), "python")))


@by_page
def test_what_a_page_names_exists(page: Path) -> None:
    assert mistakes(page.read_text(), page) == []


def test_pages_are_found_and_linked() -> None:
    text = README.read_text()
    assert len(PAGES) > 1
    linked = [str(page.relative_to(ROOT)) for page in PAGES[1:]]
    assert [page for page in linked if f"]({page})" not in text] == []
    assert SCRIPT.search("".join(page.read_text() for page in PAGES))
    assert blocks(text, "bash") == [
        'pip install -e ".[examples]" && python examples/quickstart.py\n',
        'pip install -e ".[test]" && pytest\n',
    ]


def test_readme_is_a_first_screen() -> None:
    assert len(README.read_text().splitlines()) <= 60


def test_readme_shows_what_its_code_prints() -> None:
    text = README.read_text()
    (shown,) = blocks(text, "text")
    assert max(map(len, shown.splitlines())) <= 100
    assert text.index("```python") < text.index("```text")
    assert normalized(shown) == normalized(run(blocks(text, "python")[0]))


def test_the_checks_find_what_is_wrong() -> None:
    good = (
        "[a](docs/limits.md) [b](docs/gpu.md#on-a-gpu) `python benchmarks/linear.py --cold 300` `fp8gemm bench --tune`"
    )
    assert mistakes(good, README) == []
    bad = {
        "[a](docs/nothing.md)": "no file docs/nothing.md",
        "[a](docs/nothing.md#at-all)": "no file docs/nothing.md",
        "[a](docs/gpu.md#nothing)": "no heading nothing in docs/gpu.md",
        "`python examples/nothing.py`": "no script examples/nothing.py",
        "`benchmarks/linear.py --cold 300 --colder 3`": "no option --colder of benchmarks/linear.py",
        "`fp8gemm heal PATH`": "no command heal",
        "```bash\nfp8gemm inspect PATH --deeply\n```": "no option --deeply of inspect",
    }
    for text, mistake in bad.items():
        assert mistakes(f"{good} {text}", README) == [mistake]
    page = ROOT / "docs" / "gpu.md"  # links are relative to the page
    assert mistakes("[a](docs/limits.md) [b](limits.md)", page) == ["no file docs/limits.md"]


def test_the_comparison_of_outputs_sees_every_number() -> None:
    (shown,) = blocks(README.read_text(), "text")
    elsewhere = (
        shown.replace("native avx512_bf16", "torch panels").replace("cpu ", "vllm ").replace("kernels   ", "kernels ")
    )
    assert elsewhere != shown
    assert normalized(elsewhere) == normalized(shown)
    for old, new in (("8.41", "16.82"), ("cpu", "kept: no engine"), ("2 converted", "1 converted"), (" x1", " x2")):
        assert normalized(shown.replace(old, new)) != normalized(shown)


def test_quickstart_gives_the_same_neighbours() -> None:
    """Real weights and sentences: the example checks cosine similarity and ranking, and exits with 1 if they are
    off."""
    done = subprocess.run(
        [sys.executable, "examples/quickstart.py", "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"nearest_neighbours_unchanged": true' in done.stdout
