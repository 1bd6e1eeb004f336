"""One step of benchmarks/first_contact.py: runs its rows one after the other and writes each into the journal.

    python benchmarks/contact_worker.py STEP --journal FILE [--device cpu]

Rows that the journal has already, of a process that died, are not repeated. After a row that has broken the card for
this process, as an illegal access does, the process ends, and the runner starts another for the rows that are left.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from contact_journal import (
    FAILED,
    MARK,
    NO_GPU,
    NOT_THERE,
    OK,
    REFUSED,
    Found,
    Journal,
    Refused,
    Rows,
    Work,
    Wrong,
)

BROKEN = 3  # the exit status after a row that has broken the card


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all rows")
    parser.add_argument("--without", default="", help="a tool that the step needs and that is not there")
    arguments = parser.parse_args()
    journal = Journal(arguments.journal)
    if note := no_gpu(arguments.device):
        journal.add({"none": NO_GPU, "note": note})
    elif arguments.without:
        journal.add({"none": NOT_THERE, "note": arguments.without})
    else:
        from contact_steps import STEPS, place  # after the question for a card, as it takes seconds

        if not journal.lines():
            journal.add({"place": place(arguments.device)})
        died = tuple(row["row"] for row in journal.rows() if row["status"] not in (OK, REFUSED, FAILED))
        work = Work(device=arguments.device, seconds=arguments.seconds, died=died)
        return run(STEPS[arguments.step](work), journal, fault_on(arguments.device))
    return 0


def no_gpu(device: str) -> str:
    """Why there is no card to run on; empty if there is one."""
    if device != "cuda":
        return ""
    driver = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(driver)
    except OSError:
        return f"there is no CUDA driver ({driver})"
    import torch

    if torch.cuda.is_available():
        return ""
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    return f"torch {torch.__version__} {built} and finds no card"


def fault_on(device: str) -> Callable[[], str]:
    """Tells why the card is of no further use to this process; empty if it is."""
    from card import fault

    return fault if device == "cuda" else lambda: ""


def run(rows: Rows, journal: Journal, fault: Callable[[], str] = lambda: "") -> int:
    """Runs the rows that the journal does not have; returns the exit status."""
    if not journal.names():
        journal.add({"rows": list(rows)})
    known = set(journal.started())
    for name, measure in rows.items():
        if name in known:
            continue
        journal.add({"start": name})
        print(f"{MARK}{name}", flush=True)
        began = time.perf_counter()
        outcome = outcome_of(measure)
        broken = fault()
        if broken and outcome["status"] != FAILED:
            outcome |= {"status": FAILED, "note": broken}
        journal.add({"row": name, "seconds": round(time.perf_counter() - began, 3), **outcome})
        if broken:
            print(f"the card is of no further use to this process: {broken}", flush=True)
            return BROKEN
    return 0


def outcome_of(measure: Callable[[], Found]) -> Found:
    """The status of a row, and what it found or why it did not."""
    try:
        return {"status": OK, "found": measure()}
    except Refused as reason:
        return {"status": REFUSED, "note": str(reason)}
    except Wrong as failure:
        return {"status": FAILED, "note": str(failure), "found": failure.found}
    except Exception as failure:  # whatever kernels, compilers and drivers raise: the other rows still run
        traceback.print_exc()
        sys.stderr.flush()
        return {"status": FAILED, "note": f"{type(failure).__name__}: {' '.join(str(failure).split())[:400]}"}


if __name__ == "__main__":
    raise SystemExit(main())
