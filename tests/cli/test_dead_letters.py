"""Poisoned calls, from the first kill to the retry, by real command lines on a real broker."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker.errors import Poisoned
from tests.support.running import Running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path) as broker:
        yield broker


def letters(running: Running, *words: str, code: int = 0) -> Any:
    command = [
        sys.executable,
        "-m",
        "mcp_broker",
        "dead-letters",
        *words,
        "--json",
        "--profile",
        str(running.profile),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout or done.stderr)


def test_call_that_kills_two_workers_is_listed_shown_retried_and_gone(
    running: Running, tmp_path: Path
) -> None:
    antidote = tmp_path / "antidote"
    assert letters(running, "list") == {"dead_letters": []}
    with running.client() as client, pytest.raises(Poisoned) as poisoned:
        client.call("t.poison", {"antidote": str(antidote)}, timeout_s=30)
    assert "killed 2 workers" in str(poisoned.value)
    (listed,) = letters(running, "list")["dead_letters"]
    assert listed["tool"] == "t.poison"
    assert len(set(listed["workers"])) == 2
    shown = letters(running, "show", listed["call_id"][:12])
    assert shown["arguments"] == {"antidote": str(antidote)}
    assert [one["signal"] for one in shown["certificates"]] == ["SIGKILL", "SIGKILL"]
    antidote.touch()
    assert letters(running, "retry", listed["call_id"]) == "harmless"
    assert letters(running, "list") == {"dead_letters": []}
    assert letters(running, "drop", listed["call_id"], code=1)["error"]["code"] == "NOT_FOUND"
