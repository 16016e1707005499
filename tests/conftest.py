"""Adds `--slow`: tests marked slow run only with it. A fixture for tests that press Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from tests.simulated_device import NAME, simulated

# Read when Ray is imported: under `uv run` it would otherwise make each worker an environment of its own.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several processes: they share the cores
        torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def simulation(request: pytest.FixtureRequest) -> Iterator[None]:
    """The simulated device for the tests that run on it, and for no other."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    with simulated() if parameters.get("device") == NAME else contextlib.nullcontext():
        yield


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handling of Ctrl-C, also where the tests were started in the background, where shells ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lines of progress, which a run writes to a log after a few seconds."""
    monkeypatch.setattr("torchreach.app.console.FIRST", 1e6)
