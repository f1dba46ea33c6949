"""What both loops share: moving bytes between link and session, opening the link again, and when to end."""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.errors import ConfigError
from mcp_broker.worker import ending, exhaustion, forks
from mcp_broker.worker.bytestream import ByteStream
from mcp_broker.worker.interrupts import CallInterrupted
from mcp_broker.worker.link import Link, LinkLost
from mcp_broker.worker.session import Session, State
from mcp_broker.worker.uploads import Received

if TYPE_CHECKING:
    from mcp_broker.worker.execution import Execution
    from mcp_broker.worker.interrupts import Interrupts
    from mcp_broker.worker.session import Pending

#: waits between attempts to reach the broker, seconds: doubling, each drawn from the half below
_BACKOFF_S: Final = (0.05, 1.0)
#: what was sent last may take this long to leave, milliseconds
LINGER_MS: Final = 500


class Shell:
    """Keeps a session on a link.

    Args:
        session: what to say.
        link: how it is carried.
        execution: who runs the calls.
        interrupts: who may stop them.
    """

    def __init__(self, session: Session, link: Link, execution: Execution, interrupts: Interrupts) -> None:
        self.session = session
        self.link = link
        self.execution = execution
        self.interrupts = interrupts
        self._backoff_s = _BACKOFF_S[0]
        self._retry_at = 0.0
        self._are_files_bound = False
        self._thread = threading.get_ident()
        execution.report = self.report
        execution.open_upload = self.open_upload

    def connect(self) -> float:
        """Open the link if its time has come; return how long to wait at most, seconds."""
        now = time.monotonic()
        if not self.link.is_open:
            if now < self._retry_at:
                return self._retry_at - now
            self.link.open()
            self.session.opened(now)
        # after a long call, what the broker said meanwhile is still to be read
        elif self.session.state is State.CLOSED or (
            now >= self.session.silent_at() and not self.link.is_readable()
        ):
            self.lost()
            return self.connect()
        return max(0.0, self.session.silent_at() - now)

    def lost(self) -> None:
        """Drop the connection; the next one comes after a pause that grows while no broker answers."""
        self.session.lost()
        self.link.close()
        self._retry_at = time.monotonic() + self._backoff_s * random.uniform(0.5, 1.0)  # noqa: S311 (jitter)
        self._backoff_s = min(self._backoff_s * 2, _BACKOFF_S[1])

    def take(self, *, hurries: bool = True) -> None:
        """Read the messages that wait, up to a turn's bound.

        Args:
            hurries: a lone call is answered before anybody asks for the next message. After a call that took its time
                the next message may be that nobody wants this one any more.
        """
        session, link = self.session, self.link
        held = len(session.inbox)
        for _ in range(limits.TURN_MESSAGES_MAX):
            is_new = session.state is State.REGISTERING
            session.receive(*link.receive(), time.monotonic())
            if is_new and session.state is not State.REGISTERING:
                self._registered()
            if hurries and not held and len(session.inbox) == 1:
                return
            if not link.is_readable():
                return

    def _registered(self) -> None:
        self._backoff_s = _BACKOFF_S[0]
        # the seqs of a new session begin again
        self.interrupts.forget()
        if self.session.state is State.REFUSED:
            raise ConfigError(f"the broker refused its tools: {self.session.refusal}")
        open_files = self.execution.bounds.get("open_files")
        if open_files is not None and not self._are_files_bound:
            self._are_files_bound = True
            exhaustion.bind_files(int(open_files))

    def send(self) -> None:
        """Send what the session has to say.

        Raises:
            LinkLost: the connection takes nothing.
        """
        outgoing = self.session.outgoing
        if outgoing:
            send = self.link.send
            for envelope, body in outgoing:
                send(envelope, body)
            outgoing.clear()

    def report(self, pending: Pending, fraction: float | None, message: str) -> None:
        """Send a running call's progress at once, in the middle of its tool's code; a fork has no link to send it by."""
        if forks.is_fork:
            return
        if threading.get_ident() != self._thread:
            self.report_from_afar(pending, fraction, message)
            return
        # a connection that is gone is noticed by the next turn, which ends the call
        with self.interrupts.shielded(), contextlib.suppress(LinkLost):
            self.session.progress(pending, fraction, message)
            self.send()

    def report_from_afar(self, pending: Pending, fraction: float | None, message: str) -> None:
        """Take progress from a thread that may not touch the link: this one's is inside the tool, so it is lost."""

    def open_upload(self, pending: Pending) -> ByteStream:
        """Begin to take a running call's upload."""
        self.session.uploads[pending.dispatch.call_id] = Received(deque())
        return ByteStream.over(functools.partial(self.read, pending), None)

    def read(self, pending: Pending) -> bytes:
        """Wait for the next chunk of a call's upload, in the middle of its tool's code; no bytes at the end.

        Raises:
            CallInterrupted: nobody wants the call any more.
            ConnectionError: the bytes cannot come any more.
            RuntimeError: this is another process or thread than the tool was called in (its author's fault).
        """
        if forks.is_fork or threading.get_ident() != self._thread:
            raise RuntimeError(
                "a ByteStream is read in the process and thread that its tool was called in, or by `async for`"
            )
        with self.interrupts.shielded():
            while (data := self.session.read(pending)) is None:
                if self.is_unwanted(pending):
                    raise CallInterrupted
                try:
                    left_s = min(self.connect(), max(0.0, pending.deadline - time.monotonic()))
                    self.send()
                    if self.link.is_open and self.link.wait(left_s):
                        self.take()
                except LinkLost:
                    self.lost()
            # a connection that is gone is noticed by the next turn
            with contextlib.suppress(LinkLost):
                self.send()
        return data

    def obey(self) -> None:
        """Run the hooks that the broker wants run; what comes of them goes out with the next message."""
        orders = self.session.orders
        while orders:
            order = orders.popleft()
            self.session.hooked(order, self.execution.hooks.run(order.event, order.tool))

    def is_unwanted(self, pending: Pending) -> bool:
        """Tell whether nobody takes what a running call says, or gives what it reads, any more."""
        interrupts = self.interrupts
        return (
            pending.life != self.session.life
            or pending.dispatch.call_id in self.session.cancelled
            or interrupts.asked == pending.dispatch.seq
            or interrupts.stopping
            or time.monotonic() >= pending.deadline
        )

    def has_ended(self) -> bool:
        """Tell whether the worker is to exit now."""
        if self.interrupts.stopping:
            return not self.session.running
        draining = self.session.state is State.DRAINING
        return draining and not self.session.inbox and not self.session.running

    def end(self) -> None:
        """Run the stop hooks, say goodbye and close; from here on the process has a bounded time."""
        # who was told to end at once is missed already, and killed by who told it
        ending.bound(limits.STOP_S if self.interrupts.stopping else limits.HOOK_S)
        self.interrupts.rested()
        # before the hooks, which may take all of that time
        with contextlib.suppress(LinkLost):
            self.session.flush()
            self.send()
        self.execution.hooks.end()
        self.session.goodbye("drained" if self.session.state is State.DRAINING else "stopped")
        # without a link nobody is left to hear it
        with contextlib.suppress(LinkLost):
            self.send()
        self.link.end(LINGER_MS)
