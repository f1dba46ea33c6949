from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from tests.support.load import Soak
from tests.support.running import Running

_reports: list[Soak] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run load and soak tests with their full counts")


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> Soak:
    # a run of all tests finds this file too late for its option to be known
    is_full = bool(request.config.getoption("--soak", default=False))
    one = Soak(is_full, request.node.name.removeprefix("test_").replace("_", " "))
    _reports.append(one)
    return one


Start = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start a broker in a folder of its own."""

    @contextmanager
    def starting(**setting: Any) -> Iterator[Running]:
        with Running(tmp_path_factory.mktemp("soak"), **setting) as running:
            yield running

    return starting


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for one in _reports:
        if one.lines:
            terminalreporter.write_line(f"{one.title} ({'full' if one.is_full else 'sample'})")
            for line in one.lines:
                terminalreporter.write_line(f"    {line}")
