from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mcp_broker.cli import connection, root
from tests.cli.doubles import FakeClient, Result

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _nothing_of_the_callers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # commands that are shown to be copied begin as this one did
    monkeypatch.setattr(sys, "argv", ["mcp-broker"])
    for name in ("MCP_BROKER_PROFILE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MCP_BROKER_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line here and return its exit code and output."""

    def invoke(*arguments: str) -> Result:
        capsys.readouterr()
        code = root.run(arguments)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return invoke


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """What every command connects to."""
    fake = FakeClient()

    @contextlib.contextmanager
    def connected(_chosen: object) -> Iterator[FakeClient]:
        yield fake

    monkeypatch.setattr(connection, "connected", connected)
    return fake
