"""The tests that need a card, as a step of benchmarks/first_contact.py: pytest's results, whatever becomes of pytest.

A test that kills pytest, or breaks the card for its process, costs only itself: pytest is started again for the tests
that come after it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from contact_journal import Found, Refused, Rows, Work, Wrong
from contact_runner import ROOT

# Each with the options that leave out what needs no card.
FILES: dict[str, tuple[str, ...]] = {
    "tests/engines/test_gpu.py": (),
    "tests/engines/test_engines.py": ("-k", "cuda"),
    "tests/bench/test_tune.py": ("-k", "on_a_card"),
}
MOST_FAILURES = 20
PASSED, FAILED, BROKE, KILLED, LATE = "passed", "failed", "broke the card", "killed pytest", "not finished"
GOOD = (PASSED, "skipped", "xfailed")
# In the text of a failure: no later product of this process can succeed.
STICKY = re.compile(
    "illegal memory access|illegal instruction|misaligned address|unspecified launch failure|device-side assert|"
    "launch timed out|uncorrectable ECC"
)
_ENDED = re.compile(r"(\S+\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
_OUTCOMES = {"PASSED": PASSED, "SKIPPED": "skipped", "XFAIL": "xfailed"}
_STARTED = re.compile(r"(\S+\.py::.+?)(?= *$| Fatal Python error)")
# The file's own limit of a test needs a plugin; without it, pytest's warning must not become an error.
_OPTIONS = ("-v", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestConfigWarning")


@dataclass(frozen=True)
class Result:
    """A test by its id, what became of it, and why."""

    test: str
    outcome: str
    why: str = ""


def tests(work: Work) -> Rows:
    end = time.monotonic() + work.seconds - 5  # so that what has ended is written down before the step is killed
    return {file: partial(outcomes, (file, *options), end) for file, options in FILES.items()}


def outcomes(arguments: Sequence[str], end: float, *, root: Path = ROOT) -> Found:
    """How many tests had which outcome.

    Raises:
        Refused: pytest is not installed.
        Wrong: some failed or did not end, with all of these; or nothing was run, with pytest's last lines.
    """
    if find_spec("pytest") is None:
        raise Refused("pytest is not installed")
    settled: list[Result] = []
    while True:
        fresh, output = run([*arguments, *(f"--deselect={one.test}" for one in settled)], end, root)
        first = next((index for index, one in enumerate(fresh) if one.outcome in (BROKE, KILLED)), None)
        # What came after it in the same process says nothing.
        settled += fresh if first is None else fresh[: first + 1]
        bad = [one for one in settled if one.outcome not in GOOD]
        if first is None or len(bad) >= MOST_FAILURES or time.monotonic() >= end:
            break
    if not settled:
        raise Wrong("no test was run", {"output": output[-1500:]})
    counts = dict(Counter(one.outcome for one in settled))
    if bad:
        text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        raise Wrong(text, {"counts": counts, "tests": [vars(one) for one in bad]})
    return {"counts": counts}


def run(arguments: Sequence[str], end: float, root: Path) -> tuple[list[Result], str]:
    """The results of one pytest, in order, and its output."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = [*_OPTIONS, f"--maxfail={MOST_FAILURES}", f"--junitxml={report}"]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *arguments],
                cwd=root,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                timeout=max(1.0, end - time.monotonic()),
                check=False,
            )
            output, left = done.stdout, KILLED
        except subprocess.TimeoutExpired as late:
            output, left = late.stdout or b"", LATE
        reasons = reasons_in(report)
    text = output.decode(errors="replace")
    return results_in(text, reasons, left), text


def results_in(output: str, reasons: dict[str, str], left: str) -> list[Result]:
    """What ``pytest -v`` has printed; a test that was started and never ended gets the outcome ``left``."""
    found: dict[str, Result] = {}
    for line in output.splitlines():
        if ended := _ENDED.match(line):
            test, outcome = ended[1], _OUTCOMES.get(ended[2], FAILED)
            why = "" if outcome in GOOD else reasons.get(test.split("::")[-1], "")
            found[test] = Result(test, BROKE if STICKY.search(why) else outcome, why)
        elif started := _STARTED.match(line):
            found.setdefault(started[1], Result(started[1], left))
    return list(found.values())


def reasons_in(report: Path) -> dict[str, str]:
    """The messages of failed tests by name, from a JUnit file; none if pytest did not live to write it."""
    if not report.is_file():
        return {}
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        for problem in (*case.iter("failure"), *case.iter("error")):
            found[case.get("name", "")] = " ".join((problem.get("message") or problem.text or "").split())[:400]
    return found
