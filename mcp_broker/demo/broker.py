"""A broker of the demo's own: a child process with everything it keeps in one temporary directory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mcp_broker.auth.places import profile_in
from mcp_broker.errors import BrokerError, SupervisionError

SERVING_S: Final = 20.0
STOP_S: Final = 15.0
POLL_S: Final = 0.02

#: TOML strings hold no raw quotes or backslashes; JSON text is a TOML basic string
CONFIG: Final = """\
[pools.echo]
module = "mcp_broker_workers.echo"

[pools.text]
module = "mcp_broker_workers.text"

[pools.sql]
module = "mcp_broker_workers.sql"
[pools.sql.options]
folder = {data}

[pools.sequence]
module = "mcp_broker_workers.sequence"

[pools.demo]
module = "mcp_broker.demo.tools"
min = 2
"""


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Wait for a condition and return how long it took, seconds.

    Raises:
        SupervisionError: it did not come true in time.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise SupervisionError(f"{what} did not happen within {timeout_s:.0f} s")
        time.sleep(POLL_S)
    return time.monotonic() - began


class DemoBroker:
    """``mcp-broker start`` in a directory, from :meth:`start` to :meth:`stop`."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.profile = profile_in(self.state_dir)
        self.log = folder / "start.log"
        self._data = data
        self._process: subprocess.Popen[bytes] | None = None
        #: every process of ours that `system.status` ever named
        self._seen: set[int] = set()

    def start(self) -> None:
        """Start it as a child process; see :meth:`wait_serving`."""
        config = self.folder / "demo.toml"
        config.write_text(CONFIG.format(data=json.dumps(str(self._data))), encoding="utf-8")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mcp_broker", "start"),
                    *("--state-dir", str(self.state_dir), "--config", str(config)),
                ],
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # our Ctrl-C is answered by stop(), once
                start_new_session=True,
            )
        self._seen.add(self._process.pid)

    def _environment(self) -> dict[str, str]:
        """Keep our own profile and directory out of the child, and everything it writes inside the folder."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MCP_BROKER_")}
        runtime = self.folder / "tmp"
        runtime.mkdir(exist_ok=True)
        return {
            **kept,
            "TMPDIR": str(runtime),
            "XDG_RUNTIME_DIR": str(runtime),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    @property
    def pid(self) -> int:
        """The supervisor's pid."""
        assert self._process is not None  # noqa: S101 (entered)
        return self._process.pid

    def wait_serving(self) -> None:
        """Wait until there is a profile to connect with.

        Raises:
            SupervisionError: it ended, or did not serve in time; the message has its last words.
        """
        wait_until(lambda: self.profile.exists() or self._ended(), SERVING_S, "the start of the broker")
        if self._ended():
            raise SupervisionError(f"mcp-broker start ended: {self.last_words()}")

    def _ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def last_words(self) -> str:
        """Return the end of what the child printed."""
        with contextlib.suppress(OSError):
            return " | ".join(self.log.read_text(errors="replace").splitlines()[-5:])
        return "nothing"

    def status(self, client: Any) -> dict[str, Any]:  # noqa: ANN401 (a Client, imported late)
        """Ask the broker for its status, and remember its processes."""
        report: dict[str, Any] = client.call("system.status", {})
        self._seen.add(int(report["broker"]["pid"]))
        for pool in report["pools"]:
            self._seen |= {int(worker["pid"]) for worker in pool["workers"]}
        return report

    def wait_settled(self, client: Any) -> dict[str, str]:  # noqa: ANN401 (as above)
        """Wait until each pool is ready or has failed for good; return the failed ones with their reasons."""
        failed: dict[str, str] = {}

        def settled() -> bool:
            with contextlib.suppress(BrokerError):
                pools = self.status(client)["pools"]
                failed.clear()
                failed.update({pool["name"]: pool["reason"] for pool in pools if pool["state"] == "failed"})
                return bool(pools) and all(
                    pool["state"] == "failed" or pool["ready"] >= pool["min"] > 0 for pool in pools
                )
            return False

        wait_until(settled, SERVING_S, "the start of every pool")
        return failed

    def stop(self) -> float:
        """End the child in order, by force if it must be; return how long it took, seconds.

        Raises:
            SupervisionError: it had to be killed.
        """
        process = self._process
        if process is None or process.poll() is not None:
            return 0.0
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise SupervisionError(f"the broker did not end within {STOP_S:.0f} s and was killed") from None
        return time.monotonic() - began

    def leftovers(self) -> list[int]:
        """Return processes of ours that still run: seen in the status, or with our folder in their command line."""
        return [pid for pid in _pids() if pid != os.getpid() and self._is_ours(pid)]

    def _is_ours(self, pid: int) -> bool:
        try:
            proc = Path("/proc") / str(pid)
            command = (proc / "cmdline").read_bytes()
            if not command:
                return False  # a zombie: somebody else's to reap
            # a pid may be reused by a stranger: ours are all Python
            return str(self.folder).encode() in command or (pid in self._seen and b"python" in command)
        except OSError:
            return False


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
