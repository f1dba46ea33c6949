"""Workers are killed under load, and each call still has one true outcome."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter, deque
from typing import TYPE_CHECKING

import pytest

from tests.support.load import outcome_of, tally
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from concurrent.futures import Future
    from typing import Any

    from mcp_broker import Client
    from tests.soak.conftest import Start
    from tests.support.load import Soak

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.soak]

TOOLS = '''
"""Tools that write down that they started, in one write."""
import os, time
from mcp_broker.worker import tool

def _start(path: str, number: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{number}\\n".encode())
    os.close(fd)

@tool(name="t.again", idempotent=True)
def again(path: str, number: int) -> int:
    """May run again."""
    _start(path, number)
    time.sleep(0.002)
    return number

@tool(name="t.once")
def once(path: str, number: int) -> int:
    """May not run again."""
    _start(path, number)
    time.sleep(0.002)
    return number
'''
CONFIG = """
[pools.t]
module = "fault_tools"
path = ["{folder}"]
min = {workers}
"""

WORKERS = 3
#: under way at any time: more than the workers take, so that each holds calls and some wait
AHEAD = 64
TIMEOUT_S = 60.0


class Load:
    """Keeps calls of both tools under way, by turns; the oldest is waited for."""

    def __init__(self, client: Client, path: str) -> None:
        self._client = client
        self._path = path
        self._under_way: deque[tuple[int, Future[Any]]] = deque()
        self.submitted = 0
        #: call -> "OK" or its error's code
        self.codes: dict[int, str] = {}

    def go_on(self) -> None:
        """Fill up, and take one outcome."""
        while len(self._under_way) < AHEAD:
            number = self.submitted
            tool = "t.once" if number % 2 else "t.again"
            future = self._client.submit(tool, {"path": self._path, "number": number}, timeout_s=TIMEOUT_S)
            self._under_way.append((number, future))
            self.submitted += 1
        self._take()

    def end(self) -> None:
        """Take the outcomes of all."""
        while self._under_way:
            self._take()

    def _take(self) -> None:
        number, future = self._under_way.popleft()
        self.codes[number] = outcome_of(future, TIMEOUT_S)


def busy(client: Client) -> list[int]:
    """Return the pids of the workers that hold calls."""
    (pool,) = client.call("system.status")["pools"]
    return [worker["pid"] for worker in pool["workers"] if worker["state"] == "busy"]


def test_killed_workers_fail_only_the_calls_that_they_had_started(start: Start, soak: Soak) -> None:
    kills = soak.count(sample=6, full=200)
    chance = random.Random(3)
    with start(tools=TOOLS, config=CONFIG, workers=WORKERS) as running, running.client() as client:
        marks = running.folder / "started"
        load = Load(client, str(marks))
        for kill in range(kills):
            until = time.monotonic() + chance.uniform(0.05, 0.2)
            while time.monotonic() < until:
                load.go_on()
            # calls are under way now, and go on while we look
            victims = wait_for(lambda: busy(client), what="a worker being busy")
            os.kill(chance.choice(victims), signal.SIGKILL)
            soak.progress(f"{kill + 1} of {kills} kills, {len(load.codes):,} calls")
        load.end()
        deaths = sum(pool["restarts"] for pool in client.call("system.status")["pools"])
        starts = Counter(map(int, marks.read_text().split()))
    codes = load.codes
    again = [code for number, code in codes.items() if number % 2 == 0]
    once = [code for number, code in codes.items() if number % 2]
    soak.report("kills", f"{kills}; restarts {deaths}")
    soak.report("idempotent", tally(again))
    soak.report("not idempotent", tally(once))
    assert sorted(codes) == list(range(load.submitted)), "each call has an outcome"
    assert set(again) <= {"OK"}
    assert set(once) <= {"OK", "WORKER_LOST"}
    # a worker runs one call at a time, so a kill hits one that had started, or one between two lines of ours: a call
    # counts as started from just before its tool's first line
    lost, again_runs = (
        once.count("WORKER_LOST"),
        sum(starts[number] - 1 for number in codes if number % 2 == 0),
    )
    silent = [number for number, code in codes.items() if number % 2 and not starts[number]]
    soak.report(
        "calls that a kill hit", f"{lost} lost, {again_runs} run again; {len(silent)} before their first line"
    )
    assert kills / 2 <= lost + again_runs <= kills
    assert len(silent) <= 1 + kills / 10
    for number, code in codes.items():
        if number % 2:
            assert starts[number] == 1 or (number in silent and code == "WORKER_LOST")
        else:
            assert 1 <= starts[number] <= 3
