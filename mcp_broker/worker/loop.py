"""The loop of a worker whose tools are all synchronous: one thread that reads, runs and answers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from mcp_broker.worker.link import Link, LinkLost
from mcp_broker.worker.shell import Shell

if TYPE_CHECKING:
    from mcp_broker.wire import messages
    from mcp_broker.worker.execution import Execution, Run
    from mcp_broker.worker.interrupts import Interrupts
    from mcp_broker.worker.session import Pending, Session

#: a finished outcome waits at most about this long for company before the next call starts
FLUSH_NS: Final = 100000
#: calls that took longer than this together may have been overtaken: what was to come after them is cancelled already
_LATE_NS: Final = 1_000_000


class Loop(Shell):
    """Runs one call after the other, in the order of their seq."""

    def __init__(self, session: Session, link: Link, execution: Execution, interrupts: Interrupts) -> None:
        super().__init__(session, link, execution, interrupts)
        #: moving mean of the time that each tool takes, nanoseconds
        self._services: dict[str, int] = {}
        self._is_late = False

    def run(self) -> None:
        """Serve until the broker drains the worker or SIGTERM comes.

        Raises:
            ConfigError: the broker refuses the tools.
        """
        session = self.session
        while not self.has_ended():
            try:
                if session.orders:
                    self.obey()
                elif session.inbox:
                    self._turn()
                else:
                    self._wait()
            except LinkLost:
                self.lost()
        self.end()

    def _wait(self) -> None:
        """Wait for messages, or for time to pass, with nothing to run."""
        timeout_s = self.connect()
        self.send()
        self.interrupts.rested()
        if self.interrupts.stopping:
            return
        if not self.link.is_open:
            self.link.wait_closed(timeout_s)
        elif self.link.wait(timeout_s):
            self.take(hurries=not self._is_late)
            self._is_late = False
            self.execution.meter.reset()

    def _turn(self) -> None:
        """Run what waits here, and answer it in as few messages as is quick."""
        session, interrupts, services = self.session, self.interrupts, self._services
        call, clock = self.execution.call, time.monotonic_ns
        began_ns = now_ns = clock()
        count = oldest_ns = 0
        while session.inbox and not interrupts.stopping:
            tool = session.inbox[0].dispatch.tool
            mean_ns = services.get(tool, 0)
            if oldest_ns and (not 0 < mean_ns <= FLUSH_NS or now_ns - oldest_ns > FLUSH_NS):
                session.pace.served(now_ns - began_ns, count)
                count = oldest_ns = 0
                self._between()
                began_ns = now_ns = clock()
                if not session.inbox or session.orders:
                    break
            pending = session.start()
            finished = call(pending, now_ns)
            if type(finished) is tuple:
                session.finish(pending, *finished)
            else:
                session.finish(pending, self._stream(finished))  # type: ignore[arg-type]
            # the end of one call is the start of the next
            ended_ns = clock()
            spent_ns = ended_ns - now_ns
            services[tool] = (mean_ns * 7 + spent_ns) >> 3 if mean_ns else spent_ns
            count += 1
            oldest_ns = oldest_ns or ended_ns
            now_ns = ended_ns
        session.pace.served(now_ns - began_ns, count)
        self._is_late = now_ns - began_ns > _LATE_NS
        session.flush()
        self.send()

    def _between(self) -> None:
        """Answer before a call that may be long, and hear what was cancelled meanwhile."""
        self.session.flush()
        self.send()
        if self.link.is_readable():
            self.take()
        self.execution.meter.reset()

    # -- streams -----------------------------------------------------------------------------------------

    def _stream(self, run: Run) -> messages.Outcome:
        """Send a stream's parts as its caller takes them; return its outcome."""
        session, pending = self.session, run.pending
        session.flush()
        while not self.is_unwanted(pending):
            # made before there is credit for it: a stream that is at its end needs none to say so
            part = self.execution.step(run)
            if not isinstance(part, bytes):
                return part
            if not session.may_send(pending, run.index):
                self._await_credit(pending, run.index)
            if not self.is_unwanted(pending) and session.part(pending, run.index, part):
                run.index += 1
                self._send_or_lose()
        return self.execution.stop(run)

    def _await_credit(self, pending: Pending, index: int) -> None:
        session = self.session
        while not (session.may_send(pending, index) or self.is_unwanted(pending)):
            try:
                left_s = min(self.connect(), max(0.0, pending.deadline - time.monotonic()))
                self.send()
                if not self.link.is_open:
                    return
                if self.link.wait(left_s):
                    self.take()
                    self.send()
            except LinkLost:
                self.lost()

    def _send_or_lose(self) -> None:
        try:
            self.send()
        except LinkLost:
            self.lost()
