"""The first half hour with a CUDA card: everything that only a card can tell, in the order that tells most.

    python benchmarks/first_contact.py [--minutes 25] [--only versions,checks,...] [--save first_contact]

Each step runs in processes of its own with a time limit, so that a fault, a hang or a broken library costs one row of
one step. Time that a step leaves over goes to the others. The record, RESULTS/SAVE.json, is written anew after each
row, and a page of text beside it at the end, with the project's goals and with what the measurements would set
differently. ``--only`` adds its steps to the record that is there. Without a card every step says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from contact_journal import FAILED, NO_GPU, TIMED_OUT, Row
from contact_runner import ROOT, Run, Step

HERE = Path(__file__).parent
CUDA = "/usr/local/cuda"  # where its installer puts it
Record = dict[str, Any]
# Shares are minutes of the default budget.
STEPS = (
    Step(name="versions", what="versions, driver, doctor, peers", share=1.0, row_seconds=120),
    Step(name="checks", what="each engine's check of itself, by scheme", share=1.0, row_seconds=120),
    Step(name="products", what="an exact product for each engine, path, scheme and M", share=2.0, row_seconds=60),
    Step(name="sanitized", what="the same under compute-sanitizer", share=2.5, row_seconds=120),
    Step(name="tests", what="the tests that need a card", share=4.5, row_seconds=3600),
    Step(
        name="probes", what="rates, accumulators, special values, torch's products, graphs", share=2.0, row_seconds=90
    ),
    Step(name="table", what="Llama-8B's products beside bfloat16 and peers", share=5.0, row_seconds=120),
    Step(name="variants", what="paths, splits and tiles; host time", share=3.0, row_seconds=90),
    Step(name="grouped", what="products of experts beside bfloat16 and peers", share=1.5, row_seconds=120),
    Step(name="models", what="whole models, eager and in CUDA graphs", share=1.5, row_seconds=120),
    Step(name="tune", what="a short tuning into a table of its own", share=1.0, row_seconds=120),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the steps; 1 if one of them failed or was not finished, 130 if interrupted, else 0."""
    arguments = parse(argv)
    path = arguments.results / f"{arguments.save}.json"
    former = opened(path)
    record: Record = {"date": datetime.date.today().isoformat(), "minutes": arguments.minutes, "steps": {}}
    if arguments.only:
        record["steps"] |= former["steps"]
    chosen = [step for step in STEPS if not arguments.only or step.name in arguments.only]

    def save() -> None:
        # What a machine without a card has to say does not replace what one with a card said.
        if ran(record) or not ran(former):
            write(record, path)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = 0
    try:
        with tempfile.TemporaryDirectory(prefix="first_contact.") as folder:
            run_all(chosen, 60 * arguments.minutes, record, save, Path(folder))
    except KeyboardInterrupt:
        status = 130
    text = page_of(record)
    print(text)
    if ran(record) or not ran(former):
        path.with_suffix(".txt").write_text(text + "\n")
        print(path, path.with_suffix(".txt"), sep="\n")
    entries = [record["steps"][step.name] for step in chosen if step.name in record["steps"]]
    return status or int(any(entry["status"] in (FAILED, TIMED_OUT) for entry in entries))


def ran(record: Record) -> bool:
    """Whether a step of a record had a card."""
    return any(entry["status"] != NO_GPU for entry in record["steps"].values())


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=sum(step.share for step in STEPS), help="for all steps")
    parser.add_argument("--only", type=steps_named, default=[], help=", ".join(step.name for step in STEPS))
    parser.add_argument("--save", default="first_contact", help="writes RESULTS/SAVE.json and RESULTS/SAVE.txt")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="a folder")
    return parser.parse_args(argv)


def steps_named(text: str) -> list[str]:
    names = [step.name for step in STEPS]
    if wrong := [name for name in text.split(",") if name not in names]:
        raise argparse.ArgumentTypeError(f"from {', '.join(names)}, found {', '.join(wrong)}")
    return text.split(",")


def run_all(chosen: list[Step], seconds: float, record: Record, save: Callable[[], None], folder: Path) -> None:
    """Runs steps one after the other, each for at most its share of the time that is left."""
    end = time.monotonic() + seconds

    def changed(entry: Row) -> None:
        if entry["status"] != NO_GPU or entry["step"] not in record["steps"]:
            record["steps"][entry["step"]] = entry
            record["place"] = entry["place"] or record.get("place", {})
            save()

    for index, step in enumerate(chosen):
        # No block of a caching allocator to hide in for what reads or writes beyond the end of a tensor.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if step.name == "sanitized" else {}
        run = Run(step=step, folder=folder, command=command_of(step), environment=environment)
        share = step.share / sum(one.share for one in chosen[index:])
        entry = run(share * (end - time.monotonic()), changed)
        changed(entry)
        print(f"{step.name}: {entry['status']} after {entry['seconds']} s {entry['note']}".rstrip(), flush=True)


def command_of(step: Step) -> Callable[[Path, float], list[str]]:
    """The command of a step, given its journal and the seconds that it has."""
    under: list[str] = []
    more: list[str] = []
    if step.name == "sanitized":
        tool = sanitizer()
        under = [] if tool is None else [tool, *SANITIZER_OPTIONS]
        more = ["--without", "compute-sanitizer is neither on PATH nor in CUDA's bin folder"] if tool is None else []

    def command(journal: Path, seconds: float) -> list[str]:
        worker = [sys.executable, str(HERE / "contact_worker.py"), step.name, "--journal", str(journal)]
        return [*under, *worker, "--seconds", f"{seconds:.0f}", *more]

    return command


# torch itself asks the driver for what is not there, and takes that as an answer: no errors of the API.
SANITIZER_OPTIONS = ("--target-processes", "application-only", "--report-api-errors", "no", "--print-limit", "20")


def sanitizer() -> str | None:
    """The path of compute-sanitizer."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), CUDA]
    folders = [os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def opened(path: Path) -> dict[str, Any]:
    """The record that is there, or an empty one.

    Raises:
        SystemExit: it is another kind of file.
    """
    if not path.exists():
        return {"steps": {}}
    record: dict[str, Any] = json.loads(path.read_text())
    if not isinstance(record.get("steps"), dict):
        raise SystemExit(f"{path} has no steps: it was not written by benchmarks/first_contact.py")
    return record


def write(record: dict[str, Any], path: Path) -> None:
    """Writes the record at once, so that a kill leaves the former one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


def page_of(record: dict[str, Any]) -> str:
    """The page, or why there is none: it needs torch, which may be what is broken."""
    sys.path.append(str(ROOT))  # a checkout need not be installed
    try:
        from contact_page import page

        return page(record)
    except Exception as failure:
        steps = [f"{name}: {entry['status']} {entry['note']}" for name, entry in record["steps"].items()]
        return "\n".join([*steps, f"no page: {type(failure).__name__}: {failure}"])


if __name__ == "__main__":
    raise SystemExit(main())
