"""Real processes for tests: a pool of ranks over one backend, and tables of what each of them has to do.

A test module lists its cases in a table and hands every case to a pool::

    cases = Cases("DDP")

    @cases.works("gradients are averaged")
    def _(rank: Rank) -> None: ...

    @pytest.mark.parametrize("case", cases.all(), ids=str)
    def test_ddp(case: Case, world: int, backend: str) -> None:
        case.check(world, backend)
"""

from __future__ import annotations

import atexit
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fp8gemm import native

PATIENCE = 180  # seconds for one case
GRACE = 5  # seconds that the other ranks get once one has failed


@dataclass(frozen=True)
class Rank:
    """What a case knows of the process that it runs in."""

    number: int
    world: int
    device: torch.device
    folder: Path  # the same for all ranks, empty at first

    def __index__(self) -> int:
        return self.number


@dataclass(frozen=True)
class Case:
    """Something that every rank does; ``refused`` are words of the error that it has to end with on every rank."""

    area: str
    name: str
    run: Callable[[Rank], None]
    refused: str = ""

    def __str__(self) -> str:
        return self.name.replace(" ", "-").replace(",", "")

    def __call__(self, rank: Rank) -> None:
        if not self.refused:
            self.run(rank)
            return
        told = ""
        try:
            self.run(rank)
        except BaseException as error:  # torch has some that are no Exceptions
            told = str(error)
        assert self.refused in told, f"refused in other words, or not at all: {told}"

    def check(self, world: int, backend: str) -> None:
        """Runs it in every process of the pool of this size; raises what any of them raised."""
        pool(world, backend).run(self)

    def __reduce__(self) -> Any:
        return _find, (self.run.__module__, self.area, self.name)


class Cases:
    """The cases of one area, in the order in which a table of the docs lists them."""

    def __init__(self, area: str) -> None:
        self.area = area
        self.rows: dict[str, Case] = {}
        TABLES.append(self)

    def all(self) -> list[Case]:
        return list(self.rows.values())

    def works(self, name: str) -> Callable[[Callable[[Rank], None]], Callable[[Rank], None]]:
        return self.refuses(name, "")

    def refuses(self, name: str, words: str) -> Callable[[Callable[[Rank], None]], Callable[[Rank], None]]:
        def register(run: Callable[[Rank], None]) -> Callable[[Rank], None]:
            assert name not in self.rows, name
            self.rows[name] = Case(self.area, name, run, words)
            return run

        return register


TABLES: list[Cases] = []


def _find(module: str, area: str, name: str) -> Case:
    """The case of a test module, imported if it is not yet; cases travel between processes by name."""
    __import__(module)
    return next(table for table in TABLES if table.area == area).rows[name]


class Pool:
    """Processes that have joined one process group and wait for cases."""

    def __init__(self, world: int, backend: str) -> None:
        self.folder, self.closed = tempfile.TemporaryDirectory(), False
        native.find()  # compiled once, before every rank would
        context = get_context("spawn")
        self.pipes, self.processes, self.count = [], [], 0
        for number in range(world):
            here, there = context.Pipe()
            args = (number, world, backend, self.folder.name, there)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, case: Case) -> None:
        self.count += 1
        for pipe in self.pipes:
            pipe.send((case, self.count))
        answers: dict[int, str] = {}
        end = time.monotonic() + PATIENCE
        while len(answers) < len(self.pipes) and (left := end - time.monotonic()) > 0:
            waiting = [pipe for number, pipe in enumerate(self.pipes) if number not in answers]
            for pipe in connection.wait(waiting, left):
                number = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[number] = self.pipes[number].recv()
                except EOFError:
                    self.processes[number].join()
                    answers[number] = f"it died with exit status {self.processes[number].exitcode}"
                if answers[number]:
                    end = min(end, time.monotonic() + GRACE)
        answers |= {number: "no answer" for number in range(len(self.pipes)) if number not in answers}
        if any(answers.values()):
            self.close()  # ranks may wait for each other: the next case gets new ones
            told = [f"rank {number}: {answer}" for number, answer in sorted(answers.items()) if answer]
            raise AssertionError("\n".join(told))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        self.closed = True
        self.folder.cleanup()


POOLS: dict[tuple[int, str], Pool] = {}


def pool(world: int, backend: str) -> Pool:
    """The pool of this size, started when it is first asked for or when a case has left the former one in disorder."""
    if (found := POOLS.get((world, backend))) is None or found.closed:
        found = POOLS[world, backend] = Pool(world, backend)
        atexit.register(found.close)
    return found


def _serve(number: int, world: int, backend: str, folder: str, pipe: connection.Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    device = torch.device("cuda", number) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world))
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=timedelta(seconds=PATIENCE))
    while True:
        case, count = pipe.recv()
        place = Path(folder, str(count))
        place.mkdir(exist_ok=True)
        try:
            torch.manual_seed(0)
            case(Rank(number, world, device, place))
            dist.barrier()
            pipe.send("")
        except BaseException:
            pipe.send(traceback.format_exc())
