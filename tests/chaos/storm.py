"""Does to a running broker what a plan says, and waits for it to be whole again."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, Final

import psutil

from mcp_broker.errors import BrokerError
from tests.chaos import load
from tests.chaos.ledger import Ledger, Recovery
from tests.chaos.plan import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mcp_broker import Client
    from tests.chaos.plan import Fault
    from tests.support.running import Running

#: whoever is not whole again by then does not recover
RECOVER_S: Final = 15.0
#: all workers die within a second of their supervisor; on a machine with other work
ALL_GONE_S: Final = 1.0
#: fewer descriptors than anybody has, and more than a process waits for by poll, which fails when it may have fewer
FEW: Final = 12
_LOOK_S: Final = 0.005
_ASK_S: Final = 2.0


class Storm:
    """Faults on one broker.

    Args:
        probe: a client of its own; it asks and tries, while others carry the load.
        path: where the tools write that they ran; probes write there too, under numbers below 0.
    """

    def __init__(self, running: Running, probe: Client, path: Path, workers: int, ledger: Ledger) -> None:
        self._running = running
        self._probe = probe
        self._path = str(path)
        self._workers = workers
        self._ledger = ledger
        self._probes = 0

    def strike(self, fault: Fault) -> None:
        """Let one fault happen, and note what became of it."""
        note = ""
        kind = fault.kind
        if kind is Kind.WORKER_KILL:
            victim = self._victim(fault)
            os.kill(victim, signal.SIGKILL)
            began = time.monotonic()
            took_s = self._recovered(began, without=victim)
        elif kind is Kind.BROKER_KILL:
            victim = self._status()["broker"]["pid"]
            os.kill(victim, signal.SIGKILL)
            began = time.monotonic()
            took_s = self._recovered(began, without=victim)
        elif kind is Kind.SUPERVISOR_KILL:
            began, note = self._kill_supervisor()
            took_s = self._recovered(began)
        elif kind is Kind.FULL_SCRATCH:
            note = self._fill()
            began = time.monotonic()
            if note != "RESOURCE_EXHAUSTED":
                self._ledger.violations.append(f"a full scratch folder ended as {note}")
            took_s = self._recovered(began)
        else:
            with self._lasting(fault):
                time.sleep(fault.lasts_s)
            began = time.monotonic()
            took_s = self._recovered(began)
        self._ledger.recoveries.append(Recovery(kind, took_s, note))

    # -- faults --------------------------------------------------------------------------------------

    def _victim(self, fault: Fault) -> int:
        workers = [worker["pid"] for worker in self._pool(self._status())["workers"]]
        return int(workers[int(fault.draw * len(workers))])

    @contextlib.contextmanager
    def _lasting(self, fault: Fault) -> Iterator[None]:
        status = self._status()
        if fault.kind is Kind.WORKER_STOP:
            with _stopped(self._victim(fault)):
                yield
        elif fault.kind is Kind.BROKER_STOP:
            with _stopped(status["broker"]["pid"]):
                yield
        elif fault.kind is Kind.SUPERVISOR_STOP:
            with _stopped(status["supervisor"]["pid"]):
                yield
        elif fault.kind is Kind.BROKER_FILES:
            with _without_descriptors(status["broker"]["pid"]), _connections(status["endpoints"]["clients"]):
                yield
        else:
            # a worker that dies meanwhile cannot be replaced
            with _without_descriptors(status["supervisor"]["pid"]):
                os.kill(self._victim(fault), signal.SIGKILL)
                yield

    def _kill_supervisor(self) -> tuple[float, str]:
        family = psutil.Process(self._running.process.pid).children(recursive=True)
        self._running.process.kill()
        self._running.process.wait()
        began = time.monotonic()
        _, left = psutil.wait_procs(family, timeout=ALL_GONE_S)
        # a zombie is dead; it waits for init, which is not ours to hurry
        alive = [process for process in left if _is_alive(process)]
        if alive:
            self._ledger.violations.append(f"{len(alive)} processes outlived their supervisor: {alive}")
        gone_s = time.monotonic() - began
        self._running.start()
        return began, f"all gone after {gone_s * 1000:.0f} ms"

    def _fill(self) -> str:
        try:
            self._probe.call("c.fill", timeout_s=load.TIMEOUT_S)
        except BrokerError as error:
            return getattr(error, "code", type(error).__name__)
        return "OK"

    # -- recovery --------------------------------------------------------------------------------------

    def _recovered(self, began: float, *, without: int = 0) -> float | None:
        """Wait until the pool is whole without the victim and a call succeeds; return seconds, None if it never was."""
        while time.monotonic() - began < RECOVER_S:
            with contextlib.suppress(BrokerError):
                if self._is_whole(self._status(timeout_s=_ASK_S), without):
                    whole_s = time.monotonic() - began
                    self._probes -= 1
                    self._probe.call(
                        load.AGAIN, {"path": self._path, "number": self._probes}, timeout_s=RECOVER_S
                    )
                    return whole_s
            time.sleep(_LOOK_S)
        self._ledger.violations.append("not whole again: " + str(self._last_words()))
        return None

    def _is_whole(self, status: Any, without: int) -> bool:
        if status["broker"]["pid"] == without:
            return False
        up = [worker for worker in self._pool(status)["workers"] if worker["state"] in ("ready", "busy")]
        return len(up) >= self._workers and all(worker["pid"] != without for worker in up)

    def _last_words(self) -> Any:
        try:
            return self._pool(self._status(timeout_s=_ASK_S))
        except BrokerError as error:
            return error

    def _status(self, timeout_s: float = RECOVER_S) -> Any:
        return self._probe.call("system.status", timeout_s=timeout_s)

    @staticmethod
    def _pool(status: Any) -> Any:
        return next(pool for pool in status["pools"] if pool["name"] == "c")


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[None]:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def _without_descriptors(pid: int) -> Iterator[None]:
    """Leave a process the descriptors that it has, and no more, not even in place of those that it closes."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (FEW, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def _connections(endpoint: str, count: int = 8) -> Iterator[None]:
    """Knock at a door that has no descriptor left to open."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection((host, int(port)), 2.0))
        yield
