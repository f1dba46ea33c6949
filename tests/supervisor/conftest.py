"""A supervisor in a process of its own, with a fake broker and fake workers that are real processes too."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import wait_for

NODE = Path(__file__).parent / "fakes" / "node.py"
PATIENCE_S = 20.0


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def of_instance(state_dir: Path) -> list[int]:
    """Return every process that names this state directory's instance in its environment."""
    try:
        instance = json.loads((state_dir / "counters.json").read_text())["instance"]
    except OSError:
        return []
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and is_running(int(path.name)):
            try:
                if f"MCPB_INSTANCE={instance}".encode() in (path / "environ").read_bytes():
                    found.append(int(path.name))
            except OSError:
                continue
    return found


class Node:
    """A running supervisor."""

    def __init__(self, state_dir: Path, config: Path, env: dict[str, str]) -> None:
        self.state_dir = state_dir
        self.runtime_dir = state_dir / "runtime"
        self.events: list[dict[str, Any]] = []
        self._unread = b""
        self._log = (state_dir.parent / f"{state_dir.name}.log").open("ab")
        self.popen = subprocess.Popen(
            [sys.executable, str(NODE), str(state_dir), str(config)],
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "MCP_BROKER_RUNTIME_DIR": str(self.runtime_dir), **env},
        )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def event(self, name: str, timeout_s: float = PATIENCE_S, **fields: Any) -> dict[str, Any]:
        """Return the next event of this name and with these fields; others before it are kept in `events`."""
        deadline = time.monotonic() + timeout_s
        while True:
            event = self._next(deadline, f"{name} {fields}")
            if event["event"] == name and all(event[key] == value for key, value in fields.items()):
                return event

    def _next(self, deadline: float, what: str) -> dict[str, Any]:
        assert self.popen.stdout is not None
        while b"\n" not in self._unread:
            left_s = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self.popen.stdout], [], [], left_s)
            chunk = os.read(self.popen.stdout.fileno(), 65536) if ready else b""
            if not chunk:
                log = Path(self._log.name).read_text()
                raise AssertionError(f"no {what} but {self.events}\n{log}")
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        self.events.append(json.loads(line))
        return self.events[-1]

    def order(self, **order: Any) -> list[dict[str, Any]]:
        """Give the fake broker an order; return what it was told by its supervisor so far."""
        ports = json.loads((self.state_dir / "ports.json").read_text())
        with socket.create_connection(("127.0.0.1", ports["client"]), timeout=PATIENCE_S) as connection:
            connection.sendall(json.dumps(order).encode() + b"\n")
            answer = connection.makefile().read()
        return list(json.loads(answer)) if answer else []

    def pools(self) -> dict[str, dict[str, Any]]:
        """Return the last report, by pool."""
        reports = [told for told in self.order() if told["kind"] == "REPORT"]
        return {pool["name"]: pool for pool in reports[-1]["pools"]}

    def worker(self, pool: str = "fake") -> dict[str, Any]:
        """Return the first ready worker of a pool, as reported."""

        def ready() -> dict[str, Any]:
            running = [one for one in self.pools()[pool]["workers"] if one["state"] == "running"]
            return running[0] if running else {}

        worker: dict[str, Any] = wait_for(ready, what=f"a ready worker of {pool}")
        return worker

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(PATIENCE_S)

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        self._log.close()


Start = Callable[..., Node]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a supervisor: `start(options, ...)` for one pool "fake", or `start(pools={name: options})`."""
    nodes: list[Node] = []

    def begin(
        options: dict[str, Any] | None = None,
        *,
        pools: dict[str, dict[str, Any]] | None = None,
        state: str = "state",
        head: str = "",
        env: dict[str, str] | None = None,
        keys: str = "",
        how: str = "exec",
    ) -> Node:
        config = tmp_path / f"{state}.toml"
        text = head
        for name, chosen in (pools or {"fake": options or {}}).items():
            rows = "".join(f"{key} = {json.dumps(value)}\n" for key, value in chosen.items())
            text += f'\n[pools."{name}"]\nmodule = "fake"\nstart = "{how}"\n{keys}\n[pools."{name}".options]\n{rows}'
        config.write_text(text)
        node = Node(tmp_path / state, config, env or {})
        nodes.append(node)
        return node

    yield begin
    for node in nodes:
        pids = of_instance(node.state_dir)
        node.close()
        for pid in pids:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
