"""Options and fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fp8gemm.engines import ENGINES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-engine",
        action="append",
        default=[],
        choices=list(ENGINES),
        help="fail instead of skipping where this engine rejects the machine",
    )
    parser.addoption("--world", action="append", default=[], type=int, help="how many ranks; by default two")
    parser.addoption("--fuzz-seconds", default=0, help="how long to make new mutants of checkpoint files")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with several processes run with two of them over gloo, unless --world says otherwise, and over NCCL where
    there are GPUs for it."""
    if "world" in metafunc.fixturenames:
        worlds = metafunc.config.getoption("--world") or [2]
        places = [(world, "gloo") for world in worlds]
        places += [(world, "nccl") for world in worlds if torch.cuda.device_count() >= world]
        metafunc.parametrize(("world", "backend"), places, ids=str)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def required_engines(request: pytest.FixtureRequest) -> list[str]:
    return list(request.config.getoption("--require-engine"))
