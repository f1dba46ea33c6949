"""A small echo every 10 ms, from a process of its own, and how long each took.

python -m tests.support.pulse PROFILE

For every line of its standard input, a number, it prints one line of JSON as soon as it has made that many echoes since the
last line: how many they are, and their 99th percentile. It lives until it is killed. A thread of the process that does the bulk work would measure
that process's interpreter lock.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mcp_broker import Client
from tests.support.load import percentile

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PERIOD_S = 0.01


@dataclass(frozen=True, slots=True)
class Beats:
    """What was measured between two looks."""

    count: int
    p99_ms: float


class Pulse:
    """The other process, from outside."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def look(self, at_least: int = 1) -> Beats:
        """Return what was measured since the last look, once there are so many echoes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{at_least}\n")
        self._process.stdin.flush()
        return Beats(**json.loads(self._process.stdout.readline()))


@contextmanager
def pulse(profile: Path) -> Iterator[Pulse]:
    """Start one, and end it."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.pulse", str(profile)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        try:
            yield Pulse(process)
        finally:
            process.kill()


def main(profile: str) -> None:
    """Be one."""
    times: list[float] = []
    looks: queue.SimpleQueue[int] = queue.SimpleQueue()
    wanted: int | None = None

    def listen() -> None:
        for line in sys.stdin:
            looks.put(int(line))

    threading.Thread(target=listen, daemon=True).start()
    with Client.connect(profile) as client:
        while True:
            time.sleep(PERIOD_S)
            began = time.perf_counter()
            assert client.call("echo.echo", {"value": 7}, timeout_s=30) == 7
            times.append(time.perf_counter() - began)
            if wanted is None and not looks.empty():
                wanted = looks.get()
            if wanted is not None and len(times) >= wanted:
                beats = Beats(len(times), percentile(times, 0.99) * 1000)
                print(json.dumps(asdict(beats)), flush=True)  # noqa: T201 (its answer)
                times.clear()
                wanted = None


if __name__ == "__main__":
    main(*sys.argv[1:])
