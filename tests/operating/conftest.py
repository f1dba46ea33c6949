"""A broker that is operated on while calls go on: by the supervisor's commands, and by its configuration file."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.running import Running
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mcp_broker import Client

TOOLS = '''
"""Tools that say who ran them."""
import os, time
from pathlib import Path
from mcp_broker.worker import tool

@tool(name="t.echo")
def echo(value: object = None) -> object:
    """Return the value."""
    return value

@tool(name="t.nap")
def nap(seconds: float) -> int:
    """Sleep; return the pid."""
    time.sleep(seconds)
    return os.getpid()
'''

#: another version of the same module
CHANGED = (
    TOOLS
    + '''
@tool(name="t.new")
def new() -> str:
    """Say that this is the new version."""
    return "new"
'''
)

BROKEN = TOOLS + "\nimport nowhere\n"

POOL = """
[pools.{name}]
module = "{module}"
path = ["{folder}"]
"""


class Operated:
    """A running broker, a client with all rights, and the file that it is configured by."""

    def __init__(self, running: Running, config: str) -> None:
        self.running = running
        self.folder = running.folder
        self.client: Client = running.client()
        self._config = config
        self._file = running.folder / "config.toml"

    def pool(self, name: str = "t") -> dict[str, Any]:
        """Return one pool, as status tells it; empty if there is none."""
        report: dict[str, Any] = self.client.call("system.status", {})
        return next((dict(pool) for pool in report["pools"] if pool["name"] == name), {})

    def states(self, name: str = "t") -> list[str]:
        """Return the states of a pool's workers."""
        return sorted(str(worker["state"]) for worker in self.pool(name)["workers"])

    def until(self, what: str, condition: Callable[[], Any], within_s: float = 20.0) -> Any:
        return wait_for(condition, within_s=within_s, what=what)

    def configure(self, keys: str = "", more: str = "", module: str = "fault_tools") -> None:
        """Write the file: more keys for the pool, more tables after it."""
        text = self._config.replace("#more", keys).replace('"fault_tools"', f'"{module}"')
        self._file.write_text(text + more)

    def code(self, text: str, module: str = "fault_tools") -> None:
        """Write a module of tools."""
        (self.folder / f"{module}.py").write_text(text)

    def reload(self, *pools: str) -> dict[str, Any]:
        done: dict[str, Any] = self.client.call("system.reload", {"pools": list(pools)}, timeout_s=60)
        return done

    def scale(self, workers: int | None, pool: str = "t") -> dict[str, Any]:
        arguments = {"pool": pool} if workers is None else {"pool": pool, "workers": workers}
        done: dict[str, Any] = self.client.call("system.pools.scale", arguments, timeout_s=60)
        return done

    def hang_up(self) -> None:
        self.running.process.send_signal(signal.SIGHUP)

    def command(self, *words: str) -> dict[str, Any]:
        """Run a command line that has to succeed; return its document."""
        done = self.running.command(*words, "--json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    folder = tmp_path_factory.mktemp("operated")
    config = POOL.format(name="t", module="fault_tools", folder=folder) + "#more\n"
    with Running(folder, tools=TOOLS, config=config.replace("{", "{{").replace("}", "}}")) as running:
        operated = Operated(running, config)
        with operated.client:
            yield operated
