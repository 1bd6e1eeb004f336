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
    parser.addoption("--fuzz-seconds", default=0, help="how long to make new mutants of checkpoint files")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def required_engines(request: pytest.FixtureRequest) -> list[str]:
    return list(request.config.getoption("--require-engine"))
