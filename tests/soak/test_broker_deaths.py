"""The broker is killed under load: clients go on by themselves, and nothing runs twice."""

from __future__ import annotations

import concurrent.futures
import os
import random
import signal
import time
from collections import Counter
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
"""A tool that writes down each start with its number and each end, and takes long enough to outlive its broker."""
import os, time
from mcp_broker.worker import tool

def _write(path: str, line: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, line.encode())
    os.close(fd)

@tool(name="t.once")
def once(path: str, number: int, seconds: float) -> int:
    """May not run again."""
    _write(path, f"start {number}\\n")
    time.sleep(seconds)
    _write(path, f"end {number}\\n")
    return number
'''
CLIENTS = 2
WORKERS = 2
AHEAD = 16
TIMEOUT_S = 30.0
#: from a broker's death to the first call that another one answered; on a machine with other work
BACK_S = 10.0


class Load:
    """Keeps one client's calls under way, and what came of each."""

    def __init__(self, client: Client, path: str, first: int) -> None:
        self._client = client
        self._path = path
        self._next = first
        self.submitted = 0
        self.under_way: dict[int, Future[Any]] = {}
        self.codes: dict[int, str] = {}

    def fill(self, seconds: float) -> None:
        """Submit until as many are under way as there should be."""
        while len(self.under_way) < AHEAD:
            arguments = {"path": self._path, "number": self._next, "seconds": seconds}
            self.under_way[self._next] = self._client.submit("t.once", arguments, timeout_s=TIMEOUT_S)
            self._next += CLIENTS
            self.submitted += 1

    def take(self, *, wait: bool = False) -> None:
        """Take what has ended; with ``wait`` all there is."""
        for number, future in list(self.under_way.items()):
            if wait or future.done():
                assert number not in self.codes
                self.codes[number] = outcome_of(future, TIMEOUT_S + 5)
                del self.under_way[number]


def test_killed_brokers_cost_no_call_its_outcome_and_run_none_twice(start: Start, soak: Soak) -> None:
    kills = soak.count(sample=3, full=50)
    chance = random.Random(5)
    back: list[float] = []
    with start(tools=TOOLS, workers=WORKERS) as running, running.client() as one, running.client() as two:
        path = running.folder / "runs"
        loads = [Load(one, str(path), 0), Load(two, str(path), 1)]
        for kill in range(kills):
            until = time.monotonic() + chance.uniform(0.2, 0.6)
            while time.monotonic() < until:
                for load in loads:
                    load.take()
                    load.fill(chance.uniform(0.001, 0.3))
                concurrent.futures.wait(loads[0].under_way.values(), 0.05, concurrent.futures.FIRST_COMPLETED)
            os.kill(one.call("system.status", timeout_s=TIMEOUT_S)["broker"]["pid"], signal.SIGKILL)
            died = time.monotonic()
            for load in loads:
                answered = {number for number, code in load.codes.items() if code == "OK"}

                def goes_on(load: Load = load, answered: set[int] = answered) -> bool:
                    load.take()
                    load.fill(0.01)
                    return any(code == "OK" for number, code in load.codes.items() if number not in answered)

                wait_for(goes_on, within_s=BACK_S, what="an outcome of the new broker")
            back.append(time.monotonic() - died)
            soak.progress(f"{kill + 1} of {kills} kills, {sum(len(load.codes) for load in loads):,} calls")
        for load in loads:
            load.take(wait=True)
        lines = Counter(path.read_text().splitlines())
    codes = {number: code for load in loads for number, code in load.codes.items()}
    soak.report("kills", kills)
    soak.report("outcomes", tally(list(codes.values())))
    soak.report("both clients served again within", f"{max(back):.2f} s")
    assert sum(len(load.codes) for load in loads) == sum(load.submitted for load in loads)
    assert set(codes.values()) == {"OK"}, "a broker's death costs no call its outcome"
    for number in codes:
        starts, ends = lines[f"start {number}"], lines[f"end {number}"]
        assert starts <= 1, f"call {number} ran {starts} times"
        assert ends == 1, f"call {number} was answered and did not end"
