"""A real ``mcp-broker start`` in a state directory of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Self

import psutil

from mcp_broker import Client
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

#: a pool of tools that behave badly on request
TOOLS = '''
"""Tools for fault tests."""
import os, time
from pathlib import Path
from mcp_broker.worker import tool, ToolContext

@tool(name="t.echo", idempotent=True)
def echo(value: object = None) -> object:
    """Return the value."""
    return value

@tool(name="t.nap")
def nap(seconds: float) -> str:
    """Sleep."""
    time.sleep(seconds)
    return "slept"

@tool(name="t.mark")
def mark(path: str, seconds: float = 0.0) -> int:
    """Append a line to a file, then sleep."""
    with open(path, "a") as file:
        file.write("ran\\n")
    time.sleep(seconds)
    return os.getpid()

@tool(name="t.poison", idempotent=True)
def poison(antidote: str) -> str:
    """Kill the worker, unless a file is there."""
    if not Path(antidote).exists():
        os.kill(os.getpid(), 9)
    return "harmless"

@tool(name="t.pid")
def pid() -> int:
    """Return the worker's pid."""
    return os.getpid()

@tool(name="t.steps")
def steps(context: ToolContext, n: int, pause_s: float) -> str:
    """Report progress n times, then fall silent for a second."""
    for step in range(n):
        context.progress((step + 1) / n, f"step {step + 1}")
        time.sleep(pause_s)
    time.sleep(1)
    return "done"

@tool(name="t.chunks")
def chunks(text: str, n: int) -> Iterator[str]:
    """Stream the text n times."""
    for _ in range(n):
        yield text

@tool(name="t.count")
def count(n: int) -> "Iterator[int]":
    """Stream numbers."""
    yield from range(n)
'''.replace('"Iterator[int]"', "Iterator[int]").replace(
    "import os, time", "import os, time\nfrom collections.abc import Iterator"
)

CONFIG = """
[pools.t]
module = "fault_tools"
path = ["{folder}"]
min = {workers}
"""


class Running:
    """The broker, its supervisor and workers, as one thing to start, ask and end.

    Args:
        tools: the source of the pool's module.
        config: with places for {folder} and {workers}; the module's name is fault_tools.
        prefix: of the command line that starts it, such as what changes its user.
        ready: wait until all pools are.
    """

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 1,
        tools: str = TOOLS,
        config: str = CONFIG,
        prefix: Sequence[str] = (),
        ready: bool = True,
    ) -> None:
        self.folder = folder
        self._prefix = prefix
        self.state_dir = folder / "state"
        (folder / "fault_tools.py").write_text(tools)
        self._config = folder / "config.toml"
        self._config.write_text(config.format(folder=folder, workers=workers))
        self._log = (folder / "start.log").open("ab")
        self.start(ready=ready)

    @property
    def profile(self) -> Path:
        return self.state_dir / "clients" / "default.toml"

    def start(self, *, ready: bool = True) -> None:
        command = [sys.executable, "-m", "mcp_broker", "start", "--config", str(self._config)]
        self.process = subprocess.Popen(
            [*self._prefix, *command, "--state-dir", str(self.state_dir)],
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        if ready:
            wait_for(self.is_ready, within_s=20, what="the broker being ready")

    def is_ready(self) -> bool:
        assert self.process.poll() is None, (self.folder / "start.log").read_text()
        return self.command("status").returncode == 0

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command line against this broker."""
        return subprocess.run(
            [sys.executable, "-m", "mcp_broker", *words, "--state-dir", str(self.state_dir)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def status(self) -> Any:
        return json.loads(self.command("status", "--json").stdout)

    def client(self, profile: Path | None = None) -> Client:
        return Client.connect(str(profile or self.profile))

    def profile_through(self, endpoint: str) -> Path:
        """Copy the default profile, with another address in it."""
        ours = self.status()["endpoints"]["clients"]
        path = self.folder / "through.toml"
        path.touch(0o600)
        path.write_text(self.profile.read_text().replace(ours, endpoint))
        return path

    def issue(self, name: str, *scopes: str) -> Path:
        """Make a profile that may call what the scopes say, and nothing else."""
        path = self.folder / f"{name}.toml"
        allowed = [word for scope in scopes for word in ("--allow", scope)]
        made = self.command("credentials", "issue", name, *allowed, "--out", str(path))
        assert made.returncode == 0, made.stderr
        return path

    def stop(self, within_s: float = 20.0) -> None:
        """End it by SIGTERM; no process may be left."""
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(within_s)
        self._log.close()
        _, alive = psutil.wait_procs(family, timeout=2)
        assert not alive, f"left over: {alive}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()
