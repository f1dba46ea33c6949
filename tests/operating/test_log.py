"""Where a tool's log lines go, and what `[observe]` does about them while it serves."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.running import CONFIG, Running
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mcp_broker import Client

pytestmark = [pytest.mark.process, pytest.mark.slow]

TOOLS = '''
"""A tool that logs, by its context and by itself."""
import logging
from mcp_broker.worker import tool, ToolContext

@tool(name="t.say")
def say(context: ToolContext, text: str, level: str = "INFO") -> str:
    """Log a text; return the id of the call."""
    context.logger.log(logging.getLevelNamesMapping()[level], text, extra={"rows": 3})
    logging.getLogger("birds").info("of its own: %s", text)
    return context.call_id
'''


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path, tools=TOOLS) as running:
        yield running


def logged(running: Running, text: str) -> str:
    """Wait for a line of the log that holds a text."""

    def found() -> str | None:
        lines = (running.folder / "start.log").read_text().splitlines()
        return next((line for line in lines if text in line), None)

    line = wait_for(found, what=f"a line with {text!r} in the log")
    assert line is not None
    return line


def observe(running: Running, client: Client, **keys: str) -> None:
    """Have another `[observe]`, and workers that start under it."""
    rows = "".join(f'{key} = "{value}"\n' for key, value in keys.items())
    text = CONFIG.format(folder=running.folder, workers=1) + "[observe]\n" + rows
    (running.folder / "config.toml").write_text(text)
    client.call("system.reload", {"pools": ["t"]}, timeout_s=60)


def test_what_a_tool_logs_reaches_the_log_with_its_call_and_obeys_level_and_form(running: Running) -> None:
    with running.client() as client:

        def say(text: str, level: str = "INFO") -> str:
            return str(client.call("t.say", {"text": text, "level": level}))

        call_id = say("first words")
        line = logged(running, "first words")
        assert " INFO t-" in line
        assert line.endswith(f": first words rows=3 tool=t.say call_id={call_id}")
        assert " INFO t-" in logged(running, "of its own: first words")

        observe(running, client, log_level="warning", log_format="json")
        say("too quiet")
        call_id = say("loud enough", "WARNING")
        heard: dict[str, Any] = json.loads(logged(running, "loud enough"))
        assert heard["source"] == heard["worker_id"]
        assert (heard["level"], heard["call_id"], heard["tool"], heard["rows"]) == (
            "WARNING",
            call_id,
            "t.say",
            3,
        )
        assert "too quiet" not in (running.folder / "start.log").read_text()
