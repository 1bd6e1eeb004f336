"""The tests that need a card, as a step of benchmarks/first_contact.py: pytest's results, whatever becomes of pytest.

A test that kills pytest, or breaks the card for its process, costs only itself: pytest is started again for the tests
that come after it.
"""

from __future__ import annotations

import os
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

# Each with its share of the time, and options that leave out what needs no card.
FILES: dict[str, tuple[int, tuple[str, ...]]] = {
    "tests/engines/test_gpu.py": (6, ()),
    "tests/engines/test_engines.py": (3, ("-k", "cuda")),
    "tests/bench/test_tune.py": (1, ("-k", "on_a_card")),
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
_TEST = re.compile(r"\S+\.py::.+")
_OUTCOMES = {"PASSED": PASSED, "SKIPPED": "skipped", "XFAIL": "xfailed"}
_STARTED = re.compile(r"(\S+\.py::.+?)(?= *$| Fatal Python error)")
# The file's own limit of a test needs a plugin; without it, pytest's warning must not become an error.
_OPTIONS = ("-p", "no:cacheprovider", "-W", "ignore::pytest.PytestConfigWarning")


@dataclass(frozen=True)
class Result:
    """A test by its id, what became of it, and why."""

    test: str
    outcome: str
    why: str = ""


def tests(work: Work) -> Rows:
    end = time.monotonic() + work.seconds - 5  # so that what has ended is written down before the step is killed
    return {file: partial(in_its_share, file, end) for file in FILES}


def in_its_share(file: str, end: float) -> Found:
    """``outcomes`` of one file, which leaves the files after it their share of the time until ``end``."""
    names = list(FILES)
    share, options = FILES[file]
    waiting = sum(other for other, _ in (FILES[name] for name in names[names.index(file) :]))
    now = time.monotonic()
    return outcomes((file, *options), now + (end - now) * share / waiting)


def outcomes(arguments: Sequence[str], end: float, *, root: Path = ROOT) -> Found:
    """How many tests had which outcome.

    Raises:
        Refused: pytest is not installed.
        Wrong: some failed or did not end, with all of these; or pytest found none, with what it said.
    """
    if find_spec("pytest") is None:
        raise Refused("pytest is not installed")
    text = said([*arguments, "--collect-only", "-q", "--disable-warnings"], end, root)[0]
    waiting = [line for line in text.splitlines() if _TEST.fullmatch(line)]
    if not waiting:
        raise Wrong("pytest finds no test", {"output": text[-1500:]})
    settled: list[Result] = []
    while waiting:
        fresh = run(waiting, end, root)
        first = next((index for index, one in enumerate(fresh) if one.outcome in (BROKE, KILLED)), None)
        # What came after it in the same process says nothing.
        settled += fresh if first is None else fresh[: first + 1]
        known = {one.test for one in settled}
        waiting = [test for test in waiting if test not in known]
        bad = [one for one in settled if one.outcome not in GOOD]
        if first is None or len(bad) >= MOST_FAILURES or time.monotonic() >= end:
            break
    counts = dict(Counter(one.outcome for one in settled)) | ({"not run": len(waiting)} if waiting else {})
    if bad or waiting:
        text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        raise Wrong(text, {"counts": counts, "tests": [vars(one) for one in bad]})
    return {"counts": counts}


def run(tests: Sequence[str], end: float, root: Path) -> list[Result]:
    """The results of one pytest, in order."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-v", "--tb=short", f"--maxfail={MOST_FAILURES}", f"--junitxml={report}"]
        text, in_time = said([*options, *tests], end, root)
        return results_in(text, reasons_in(report), KILLED if in_time else LATE)


def said(arguments: Sequence[str], end: float, root: Path) -> tuple[str, bool]:
    """What pytest printed, and whether it ended in time."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *_OPTIONS, *arguments],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            # Whoever runs this may want theirs side by side; these are read as they come, one by one.
            env={name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},
            timeout=max(1.0, end - time.monotonic()),
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return (late.stdout or b"").decode(errors="replace"), False
    return done.stdout.decode(errors="replace"), True


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
