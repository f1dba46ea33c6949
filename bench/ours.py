"""Ours: the real thing, as an operator starts it, and the shipped clients in a process each."""

from __future__ import annotations

import asyncio
import collections
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench import peer

if TYPE_CHECKING:
    from mcp_broker import AsyncClient, Client

TOOL: Final = "bench.echo"
START_S: Final = 30.0
STOP_S: Final = 20.0
CONFIG: Final = """\
[pools.bench]
module = "echo_tool"
path = ["{folder}"]
min = 1
"""


def _durations(seconds: list[float], elapsed: float) -> dict[str, Any]:
    return {
        "calls": len(seconds),
        "seconds": elapsed,
        "p50_us": peer.percentile_us(seconds, 0.5),
        "p99_us": peer.percentile_us(seconds, 0.99),
    }


def sync_client() -> None:
    """Drive the sync client: call after call, or a window of futures."""
    from mcp_broker import Client  # noqa: PLC0415 (the parent needs no client)

    setup = peer.read()
    assert setup is not None
    with Client.connect(profile=setup["profile"]) as connected:
        peer.answer({"pid": os.getpid()})
        peer.serve(lambda **case: _run_sync(connected, **case))


def _run_sync(
    client: Client, *, status: bool = False, seconds: float = 0, in_flight: int = 1, size: int = 1
) -> dict[str, Any]:
    if status:
        known: dict[str, Any] = client.call("system.status", {})
        return known
    arguments = {"blob": os.urandom(size)}
    clock = time.perf_counter
    began = now = clock()
    until = began + seconds
    if in_flight == 1:
        durations = []
        while now < until:
            client.call(TOOL, arguments)
            after = clock()
            durations.append(after - now)
            now = after
        return _durations(durations, now - began)
    futures = collections.deque(client.submit(TOOL, arguments) for _ in range(in_flight))
    calls = 0
    while clock() < until:
        futures.popleft().result()
        calls += 1
        futures.append(client.submit(TOOL, arguments))
    for future in futures:
        assert len(future.result()) == size
    return {"calls": calls + in_flight, "seconds": clock() - began}


def aio_client() -> None:
    """Drive the asyncio client: as many tasks as calls in flight."""
    asyncio.run(_serve_aio())


async def _serve_aio() -> None:
    from mcp_broker import AsyncClient  # noqa: PLC0415

    setup = peer.read()
    assert setup is not None
    async with AsyncClient.connect(profile=setup["profile"]) as connected:
        peer.answer({"pid": os.getpid()})
        # between rounds the loop still runs, since the client owes the broker its heartbeats
        while (question := await asyncio.to_thread(peer.read)) is not None:
            peer.answer(await _run_aio(connected, **question))


async def _run_aio(client: AsyncClient, *, seconds: float, in_flight: int, size: int) -> dict[str, Any]:
    arguments = {"blob": os.urandom(size)}
    clock = time.perf_counter
    began = clock()
    until = began + seconds
    durations: list[float] = []

    async def caller() -> None:
        now = clock()
        while now < until:
            await client.call(TOOL, arguments)
            after = clock()
            durations.append(after - now)
            now = after

    await asyncio.gather(*[caller() for _ in range(in_flight)])
    return _durations(durations, clock() - began)


class Broker:
    """Supervisor, broker and one worker in a state directory of their own, and a client process of each kind.

    Raises:
        RuntimeError: it does not serve within :data:`START_S`; the message holds its log's end.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mcp-broker-bench-")
        folder = Path(self._folder.name)
        config = folder / "config.toml"
        config.write_text(CONFIG.format(folder=Path(__file__).resolve().parent))
        self._log = folder / "log"
        state = folder / "state"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "mcp_broker",
                    "start",
                    "--state-dir",
                    str(state),
                    "--config",
                    str(config),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=peer.ROOT,
            )
        self._clients: list[peer.Peer] = []
        try:
            self.profile = state / "clients" / "default.toml"
            self._wait_for(self.profile)
            setup = {"profile": str(self.profile)}
            self.sync = peer.Peer("bench.ours", "sync", setup)
            self._clients.append(self.sync)
            self.aio = peer.Peer("bench.ours", "aio", setup)
            self._clients.append(self.aio)
            status = self._ready()
        except BaseException:
            self.close()
            raise
        self.broker_pid = int(status["broker"]["pid"])
        (pool,) = status["pools"]
        self.worker_pid = int(pool["workers"][0]["pid"])

    def _wait_for(self, profile: Path) -> None:
        until = time.monotonic() + START_S
        while not profile.exists():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"mcp-broker start does not serve:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.02)

    def _ready(self) -> dict[str, Any]:
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            status = self.sync.ask({"status": True})
            if all(pool["state"] == "ready" for pool in status["pools"]) and status["pools"]:
                return status
            time.sleep(0.02)
        raise RuntimeError(f"the pool is not ready:\n{self._log.read_text()[-2000:]}")

    def close(self) -> None:
        """End the clients, then stop the supervisor, which ends the rest."""
        for client in self._clients:
            client.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


if __name__ == "__main__":
    {"sync": sync_client, "aio": aio_client}[sys.argv[1]]()
