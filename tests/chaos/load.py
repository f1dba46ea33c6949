"""Calls at fixed instants, whatever happens, and what came of each."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from mcp_broker.errors import BrokerError
from tests.support.load import outcome_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from mcp_broker import Client

TIMEOUT_S: Final = 20.0
#: a call's outcome comes within its deadline and this
GRACE_S: Final = 5.0
AGAIN: Final = "c.again"
ONCE: Final = "c.once"

TOOLS: Final = '''
"""Tools under chaos: each run writes its number, in one write."""
import os, time
from mcp_broker.worker import tool, ToolContext

def _ran(path: str, number: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(fd, f"{number}\\n".encode())
    os.close(fd)

@tool(name="c.again", idempotent=True)
def again(path: str, number: int) -> int:
    """May run again."""
    _ran(path, number)
    return number

@tool(name="c.once")
def once(path: str, number: int) -> int:
    """May not run again."""
    _ran(path, number)
    return number

@tool(name="c.fill")
def fill(context: ToolContext) -> int:
    """Write into the scratch folder until there is no room."""
    block = bytes(1024 * 1024)
    with open(context.scratch / "full", "wb") as file:
        for _ in range(512):
            file.write(block)
            file.flush()
            # the folder is measured every now and then; a fast disk would be done before
            time.sleep(0.002)
    return 0
'''


class Load:
    """Submits by turns, ``rate`` calls a second, in a thread of its own, until it is told to end.

    Args:
        clients: take turns.
        path: where the tools write that they ran.
    """

    def __init__(self, clients: Sequence[Client], path: Path, rate: float) -> None:
        self._clients = itertools.cycle(clients)
        self._path = str(path)
        self._period_s = 1.0 / rate
        self._futures: list[tuple[int, Future[Any]]] = []
        #: of calls that could not even be submitted: number -> code
        self._refused: dict[int, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")
        self.submitted = 0
        #: by how much the thread was late at worst, seconds
        self.late_s = 0.0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _run(self) -> None:
        began = time.monotonic()
        for number in itertools.count():
            due = began + number * self._period_s
            if self._stop.wait(max(0.0, due - time.monotonic())):
                return
            self.late_s = max(self.late_s, time.monotonic() - due)
            self._submit(number)

    def _submit(self, number: int) -> None:
        tool = ONCE if number % 2 else AGAIN
        self.submitted += 1
        try:
            future = next(self._clients).submit(
                tool, {"path": self._path, "number": number}, timeout_s=TIMEOUT_S
            )
        except BrokerError as error:
            # also an outcome: the client says that it could not take the call
            self._refused[number] = getattr(error, "code", type(error).__name__)
            return
        self._futures.append((number, future))

    def end(self) -> dict[int, str]:
        """Stop, wait for what is under way, and return each call's outcome; a call without one fails here."""
        self._stop.set()
        self._thread.join()
        codes = dict(self._refused)
        for number, future in self._futures:
            assert number not in codes
            codes[number] = outcome_of(future, TIMEOUT_S + GRACE_S)
        return codes


def runs_of(path: Path) -> Counter[int]:
    """Return how often each call ran."""
    return Counter(map(int, path.read_text().split())) if path.exists() else Counter()
